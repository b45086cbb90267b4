// The second sweep, over two rows together, the policy's and the reference's: KL(policy || reference). The formulas are
// those of csrc/cpu/pairs.h, over all columns except the target.
#pragma once

#include "gradients.h"

namespace rlhf_fast::cuda {

// p_j = e^((x_j - shift) / temperature) * scale, and r_j likewise from the reference's logits and fields.
// offset = log(ref_scale / scale), computed so that it is accurate where both are close to 1.
struct Normalisers {
  float shift, scale, ref_shift, ref_scale, offset;
};

// p log(p / r) - p + r, with ratio = log(r / p). Near ratio = 0 the three terms would cancel; p * (e^ratio - 1 - ratio)
// does not.
__device__ __forceinline__ float kl_term(float p, float ratio, float r) {
  const float term = ratio <= 1 ? p * split_exponential(ratio).minus_1_and(ratio) : r - p - p * ratio;
  return p == 0 ? r : term;  // log p is -inf
}

// Writes the sum of the KL terms of each segment of each live row. op.normalisers(row, inverse_temperature) returns the
// row's Normalisers. Two blocks per multiprocessor: each of 2 x 256 threads has 128 registers, 64 of them for columns.
template <class T, bool kCapped, class Op>
__global__ void __launch_bounds__(kThreads, 2)
    sum_terms(Rows rows, Logits logits, Logits ref_logits, float* terms, int segments, Op op) {
  const auto [row, segment] = segment_of_block(segments);
  if (!is_live(rows, row)) return;
  const int start = segment * kSegment;
  const int vocab = (int)rows.vocab;
  // 1. Issue the loads, and compute the normalisers while they are in flight.
  float x[kColumns], ref_x[kColumns];
  load_columns(row_of<const T>(logits, row), vocab, start, x);
  load_columns(row_of<const T>(ref_logits, row), vocab, start, ref_x);
  const float inverse_temperature = inverse_temperature_of(rows, row), rate = kLog2E * inverse_temperature;
  const Normalisers n = op.normalisers(row, inverse_temperature);
  cap<kCapped>(x, rows.softcap);
  cap<kCapped>(ref_x, rows.softcap);
  // 2. One sum per thread, in a register, then one reduction over the block.
  const int target = target_of(rows, row);
  const bool mixed = is_mixed(start, vocab, target);
  float total[1] = {0};
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const float gap = x[i] - n.shift, ref_gap = ref_x[i] - n.ref_shift;
    // subtract the gaps first and divide by the temperature afterwards, so that equal rows give exactly 0
    const float ratio = (ref_gap - gap) * inverse_temperature + n.offset;
    const float term = kl_term(exp2_flushed(gap * rate) * n.scale, ratio, exp2_flushed(ref_gap * rate) * n.ref_scale);
    const int column = column_of<T>(start, i);
    total[0] += mixed && (column == target || column >= vocab) ? 0 : term;
  }
  block_sum(total);
  if (threadIdx.x == 0) terms[blockIdx.x] = total[0];
}

// The sum over a row's segments. A whole warp calls it, and every lane gets the result.
__device__ inline float join_terms(const float* terms, int segments, int64_t row) {
  float total = 0;
  for (int i = lane_index(); i < segments; i += kWarp) total += terms[row * segments + i];
  return warp_sum(total);
}

template <class T, class Op>
const char* sum_kl(const Rows& rows, const Logits& logits, const Logits& ref_logits, float* terms, int segments,
                   const Op& op, void* stream) {
  const auto kernel = rows.softcap == 0 ? sum_terms<T, false, Op> : sum_terms<T, true, Op>;
  return launch(kernel, rows.length * segments, kThreads, 0, stream, rows, logits, ref_logits, terms, segments, op);
}

// ---- a fold of two sets of float32 logits ---------------------------------------------------------------------------

// The upstream gradients of a row's results.
struct PairSlopes {
  float logprob, entropy, kl;
};

// The results of a pair of rows and the slopes of their gradient. op.slopes(row, logprob) returns the PairSlopes;
// op.write(row, policy, reference, kl) writes the results.
template <class Op>
struct TilePair {
  Rows rows;
  SegmentSums swept;
  const float* terms;
  Op op;

  // Recomputed by each launch that needs them: a few loads per block instead of one more launch.
  struct Results {
    RowResult p, r;
    Normalisers normalisers;
  };

  __device__ Results results(int64_t row, float inverse_temperature) const {
    const RowResult p = finish_row(rows, swept, row, 0, inverse_temperature);
    const RowResult r = finish_row(rows, swept, row, 1, inverse_temperature);
    const float offset = p.statistics.log_norm - r.statistics.log_norm;
    return {p, r, {p.statistics.shift, p.statistics.scale, r.statistics.shift, r.statistics.scale, offset}};
  }

  __device__ Normalisers normalisers(int64_t row, float inverse_temperature) const {
    return results(row, inverse_temperature).normalisers;
  }

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const auto [p, r, n] = results(row, inverse_temperature);
    // 1. The KL: the target's term plus those of the other columns.
    const float p_target = expf(p.logprob);
    const float kl = kl_term(p_target, r.logprob - p.logprob, expf(r.logprob)) + join_terms(terms, swept.segments, row);
    if (writes) op.write(row, p, r, kl);
    // 2. The slopes. An infinite KL with a gradient of 0 must add 0, not NaN; and 0 * log 0 = 0.
    const PairSlopes given = op.slopes(row, p.logprob);
    RowSlopes slopes =
        row_slopes(p.statistics, inverse_temperature, p.logprob, p.entropy, given.logprob, given.entropy);
    const float scaled_grad = given.kl * inverse_temperature;
    slopes.ref_shift = n.ref_shift;
    slopes.offset = n.offset;
    slopes.ratio_slope = -scaled_grad * n.scale;
    if (scaled_grad != 0) {
      slopes.constant += slopes.ratio_slope * kl;
      if (p_target != 0) slopes.at_target += scaled_grad * p_target * (p.logprob - r.logprob - kl);
    }
    return slopes;
  }

  __device__ void skip(int64_t row) const { op.write(row, {}, {}, 0); }
};

// Three launches: the sums of both rows, the terms of the KL, and the results with the gradient, if it is wanted.
template <class Op>
const char* fold_pairs(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad,
                       const Op& op, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, rows, 2);
  float* terms = take<float>(scratch, rows.length * swept.segments);
  if (scratch.size < scratch.needed) return nullptr;
  const TilePair<Op> tile{rows, swept, terms, op};
  const char* error = sum<float>(rows, 2, logits, ref_logits, swept, true, stream);
  if (!error) error = sum_kl<float>(rows, logits, ref_logits, terms, swept.segments, tile, stream);
  return error ? error : finish_tile<true>(rows, logits, ref_logits, grad, tile, stream);
}

}  // namespace rlhf_fast::cuda
