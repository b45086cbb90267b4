// The gradient of rows of logits in one sweep.
#pragma once

#include "sums.h"

namespace rlhf_fast::cuda {

// What a row's gradient needs. With gap = x - shift, a column other than the target has
//
//   e^(gap / temperature) * (constant + slope * gap + ratio_slope * ratio)
//
// of which the last term, with ratio = (ref_x - ref_shift - gap) / temperature + offset = log(r_j / p_j), is there for
// a pair of rows alone; the target's has at_target. The softcap's own slope comes on top.
struct Slopes {
  float shift, constant, slope, at_target;
  float ref_shift, offset, ratio_slope;
};

// Of grad_logprob * logprob + grad_entropy * entropy.
__device__ inline Slopes row_slopes(const RowStatistics& s, float inverse_temperature, float logprob, float entropy,
                                    float grad_logprob, float grad_entropy) {
  const float scale = s.scale * inverse_temperature;
  Slopes slopes{};
  slopes.shift = s.shift;
  slopes.constant = -grad_logprob;
  slopes.at_target = grad_logprob * s.others_mass;
  if (grad_entropy != 0) {
    slopes.constant += grad_entropy * (at_most(s.log_norm, kFar) - entropy);
    slopes.at_target -= grad_entropy * expf(logprob) * (entropy + (logprob < -kFar ? -kFar : logprob));
  }
  slopes.constant *= scale;
  slopes.slope = -grad_entropy * scale * inverse_temperature;
  slopes.at_target *= inverse_temperature;
  return slopes;
}

// The gradient of a segment of a row, from op(row, inverse_temperature, writes), which may write the row's own outputs.
template <class In, class Out, bool kPair, class Op>
__global__ void __launch_bounds__(kThreads, kPair ? 2 : 3)
    write_segments(Rows rows, Logits logits, Logits ref_logits, Logits grads, int columns, int segments, Op op) {
  const auto [row, segment] = segment_of_block(segments);
  Out* grad = row_of<Out>(grads, row);
  const int start = segment * kSegment - columns_before<In>(grad);
  if (start >= columns) return;  // only a row that begins between two vectors needs the last segment
  const bool writes = segment == 0 && threadIdx.x == 0;
  float x[kColumns] = {};
  if (!is_live(rows, row)) {
    if (writes) op.skip(row);
    store_columns<In>(grad, columns, start, x);
    return;
  }
  float ref_x[kPair ? kColumns : 1];
  const int vocab = (int)rows.vocab;
  load_columns(row_of<const In>(logits, row), vocab, start, x);
  if constexpr (kPair) load_columns(row_of<const In>(ref_logits, row), vocab, start, ref_x);
  const float inverse_temperature = inverse_temperature_of(rows, row), rate = kLog2E * inverse_temperature;
  const Slopes s = op(row, inverse_temperature, writes);  // while the columns are on their way
  cap(x, rows.softcap);
  if constexpr (kPair) cap(ref_x, rows.softcap);
  const int target = target_of(rows, row);
  const bool mixed = is_mixed(start, vocab, target);
  const float inverse_softcap = rows.softcap == 0 ? 0 : 1 / rows.softcap;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const float gap = x[i] - s.shift;
    const float e = exp2_flushed(gap * rate);
    // an infinite gap meets 0, but a NaN in the factors has to show
    float factor = s.constant + s.slope * (e == 0 ? 0 : gap);
    if constexpr (kPair) {
      const float ratio = (ref_x[i] - s.ref_shift - gap) * inverse_temperature + s.offset;
      factor += s.ratio_slope * (e * s.ratio_slope == 0 ? 0 : ratio);
    }
    const int column = column_of<In>(start, i);
    float g = mixed && column == target ? s.at_target : e * factor;
    if (rows.softcap != 0) g *= 1 - (x[i] * inverse_softcap) * (x[i] * inverse_softcap);
    x[i] = mixed && column >= vocab ? 0 : g;
  }
  store_columns<In>(grad, columns, start, x);
}

// Into `columns` columns of `grad`, 0 past the vocabulary and in dead rows.
template <class In, class Out, bool kPair, class Op>
const char* write_gradient(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad,
                           int64_t columns, const Op& op, void* stream) {
  const int64_t segments = segments_of(columns + kVector<In> - 1);
  return launch(write_segments<In, Out, kPair, Op>, rows.length * segments, kThreads, 0, stream, rows, logits,
                ref_logits, grad, (int)columns, (int)segments, op);
}

}  // namespace rlhf_fast::cuda
