// Two rows of logits side by side: KL(policy || reference) in a second sweep, with the formulas of csrc/cpu/pairs.h,
// over the columns other than the target.
#pragma once

#include "sums.h"

namespace rlhf_fast::cuda {

// p_j = e^((x_j - shift) / temperature) * scale, r_j the same of the reference, and offset = log(ref_scale / scale),
// exact where both scales are next to 1.
struct Normalisers {
  float shift, scale, ref_shift, ref_scale, offset;
};

// e^x - 1 - x for x <= 1, to a few units in the last place: e^x is 2^n (1 + r + tail), and next to 0, where n is 0 and
// r is x, the tail of the series alone is left.
__device__ __forceinline__ float excess(float x) {
  const float bounded = fmaxf(x, -87);
  const float shifted = bounded * kLog2E + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, left in the low bits
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  const float p =
      ((((1.9875691e-4f * r + 1.3981999e-3f) * r + 8.3334519e-3f) * r + 4.1665795e-2f) * r + 1.6666665e-1f) * r + 0.5f;
  const float power = float_of((bits_of(shifted) << 23) + 0x3f800000);
  return power * (p * (r * r)) + (power * r + (power - 1 - x));
}

// p log(p / r) - p + r, with ratio = log(r / p). Where it is next to 0 the three cancel, so they are joined.
__device__ __forceinline__ float kl_term(float p, float ratio, float r) {
  const float term = ratio <= 1 ? p * excess(ratio) : r - p - p * ratio;
  return p == 0 ? r : term;  // p has no log
}

// The KL's terms over every segment of every live row; op.normalisers(row, inverse_temperature) gives a row's.
template <class T, class Op>
__global__ void __launch_bounds__(kThreads, 2)
    sum_terms(Rows rows, Logits logits, Logits ref_logits, float* terms, int segments, Op op) {
  const auto [row, segment] = segment_of_block(segments);
  if (!is_live(rows, row)) return;
  const int start = segment * kSegment;
  const int vocab = (int)rows.vocab;
  float x[kColumns], ref_x[kColumns];
  load_columns(row_of<const T>(logits, row), vocab, start, x);
  load_columns(row_of<const T>(ref_logits, row), vocab, start, ref_x);
  const float inverse_temperature = inverse_temperature_of(rows, row), rate = kLog2E * inverse_temperature;
  const Normalisers n = op.normalisers(row, inverse_temperature);  // while the columns are on their way
  cap(x, rows.softcap);
  cap(ref_x, rows.softcap);
  const int target = target_of(rows, row);
  const bool mixed = is_mixed(start, vocab, target);
  float total[1] = {0};
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const float gap = x[i] - n.shift, ref_gap = ref_x[i] - n.ref_shift;
    // the gaps meet before the temperature rounds them, so that equal rows give exactly 0
    const float ratio = (ref_gap - gap) * inverse_temperature + n.offset;
    const float term = kl_term(exp2_flushed(gap * rate) * n.scale, ratio, exp2_flushed(ref_gap * rate) * n.ref_scale);
    const int column = column_of<T>(start, i);
    total[0] += mixed && (column == target || column >= vocab) ? 0 : term;
  }
  block_sum(total);
  if (threadIdx.x == 0) terms[blockIdx.x] = total[0];
}

// Of a row; a warp asks, every lane has it.
__device__ inline float join_terms(const float* terms, int segments, int64_t row) {
  float total = 0;
  for (int i = lane_index(); i < segments; i += kWarp) total += terms[row * segments + i];
  return warp_sum(total);
}

template <class T, class Op>
const char* sum_kl(const Rows& rows, const Logits& logits, const Logits& ref_logits, float* terms, int segments,
                   const Op& op, void* stream) {
  return launch(sum_terms<T, Op>, rows.length * segments, kThreads, 0, stream, rows, logits, ref_logits, terms,
                segments, op);
}

}  // namespace rlhf_fast::cuda
