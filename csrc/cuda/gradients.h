// The last sweep: the gradient of rows of logits.
#pragma once

#include "sums.h"

namespace rlhf_fast::cuda {

// The coefficients of a row's gradient. With gap = x - shift, the gradient of a column other than the target is
//
//   e^(gap / temperature) * (constant + slope * gap + ratio_slope * ratio)
//   ratio = log(r_j / p_j) = (ref_x - ref_shift - gap) / temperature + offset
//
// and that of the target is at_target, both times the derivative of the softcap. The last term is used only for a pair
// of rows.
struct RowSlopes {
  float shift, constant, slope, at_target;
  float ref_shift, offset, ratio_slope;
};

// The slopes of grad_logprob * logprob + grad_entropy * entropy + grad_logsumexp * logsumexp.
__device__ inline RowSlopes row_slopes(const RowStatistics& s, float inverse_temperature, float logprob, float entropy,
                                       float grad_logprob, float grad_entropy, float grad_logsumexp = 0) {
  const float scale = s.scale * inverse_temperature;
  RowSlopes slopes{};
  slopes.shift = s.shift;
  slopes.constant = grad_logsumexp - grad_logprob;
  slopes.at_target = grad_logprob * s.others_mass;
  if (grad_logsumexp != 0) slopes.at_target += grad_logsumexp * expf(logprob);
  // An entropy whose gradient is 0 may be infinite or NaN; its product must be 0.
  if (grad_entropy != 0) {
    slopes.constant += grad_entropy * (at_most(s.log_norm, kFar) - entropy);
    slopes.at_target -= grad_entropy * expf(logprob) * (entropy + (logprob < -kFar ? -kFar : logprob));
  }
  slopes.constant *= scale;
  slopes.slope = -grad_entropy * scale * inverse_temperature;
  slopes.at_target *= inverse_temperature;
  return slopes;
}

// Writes the gradient of a segment of a row. op(row, inverse_temperature, writes) returns the slopes. In the one thread
// where `writes` is true it may also write the outputs of the row, which saves a launch.
//
// The launch bounds are blocks per multiprocessor: with 3 x 256 threads each has 80 registers, with 2 x 256, for a pair
// of rows or 128 bytes of loads a thread, 128.
template <class In, class Out, bool kPair, bool kCapped, class Op>
__global__ void __launch_bounds__(kThreads, kPair || sizeof(In) == 4 ? 2 : 3)
    write_segments(Rows rows, Logits logits, Logits ref_logits, Logits grads, int columns, int segments, Op op) {
  const auto [row, segment] = segment_of_block(segments);
  Out* grad = row_of<Out>(grads, row);
  const int start = segment * kSegment - columns_before<In>(grad);
  if (start >= columns) return;  // the grid has room for the shift by columns_before; without it a segment is empty
  const bool writes = segment == 0 && threadIdx.x == 0;
  float x[kColumns] = {};
  if (!is_live(rows, row)) {
    if (writes) op.skip(row);
    store_columns<In>(grad, columns, start, x);
    return;
  }
  // 1. Issue the loads, and compute the slopes while they are in flight. The temperature is loaded before: selecting
  // its source while the columns are in flight takes two registers too many.
  const float inverse_temperature = inverse_temperature_of(rows, row), rate = kLog2E * inverse_temperature;
  float ref_x[kPair ? kColumns : 1];
  const int vocab = (int)rows.vocab;
  load_columns(row_of<const In>(logits, row), vocab, start, x);
  if constexpr (kPair) load_columns(row_of<const In>(ref_logits, row), vocab, start, ref_x);
  const RowSlopes s = op(row, inverse_temperature, writes);
  cap<kCapped>(x, rows.softcap);
  if constexpr (kPair) cap<kCapped>(ref_x, rows.softcap);
  // 2. The gradient replaces x in the registers. `mixed` is uniform over the block; most blocks compare no columns.
  const int target = target_of(rows, row);
  const bool mixed = is_mixed(start, vocab, target);
  const float inverse_softcap = kCapped ? 1 / rows.softcap : 0;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const float gap = x[i] - s.shift;
    const float e = exp2_flushed(gap * rate);
    // A gap of -inf has e = 0, and 0 * -inf must be 0. A NaN in the slopes still reaches the gradient.
    float factor = s.constant + s.slope * (e == 0 ? 0 : gap);
    if constexpr (kPair) {
      const float ratio = (ref_x[i] - s.ref_shift - gap) * inverse_temperature + s.offset;
      factor += s.ratio_slope * (e * s.ratio_slope == 0 ? 0 : ratio);
    }
    const int column = column_of<In>(start, i);
    float g = mixed && column == target ? s.at_target : e * factor;
    if (kCapped) g *= 1 - (x[i] * inverse_softcap) * (x[i] * inverse_softcap);
    x[i] = mixed && column >= vocab ? 0 : g;
  }
  // 3. In place is safe: the block has read all the columns that it writes, and no other block reads them.
  store_columns<In>(grad, columns, start, x);
}

// Writes `columns` columns of `grad`, 0 past the vocabulary and in dead rows.
template <class In, class Out, bool kPair, class Op>
const char* write_gradient(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad,
                           int64_t columns, const Op& op, void* stream) {
  const int64_t segments = segments_of(columns + kVector<In> - 1);
  const auto kernel =
      rows.softcap == 0 ? write_segments<In, Out, kPair, false, Op> : write_segments<In, Out, kPair, true, Op>;
  return launch(kernel, rows.length * segments, kThreads, 0, stream, rows, logits, ref_logits, grad, (int)columns,
                (int)segments, op);
}

// The last launch of a fold (rlhf_fast/ops/_sweep.py), on float32 logits. Writes the outputs of the rows and, if it is
// wanted, the gradient: in place in float32, or to other memory in a 16-bit type.
template <bool kPair, class Op>
const char* finish_tile(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad,
                        const Op& op, void* stream) {
  if (!grad.data) return finish(rows, op, stream);
  return typed(grad.dtype, [&](auto kind) {
    return write_gradient<float, decltype(kind), kPair>(rows, logits, ref_logits, grad, rows.vocab, op, stream);
  });
}

}  // namespace rlhf_fast::cuda
