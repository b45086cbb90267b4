// log softmax(logits)[target] and the entropy. The forward reads the logits once and saves four numbers per row. The
// backward reads the logits once and writes the gradient, which may overwrite them.
//
//   formula         log p_t = -softplus(d), d = logsumexp_{j != t} x_j - x_t (rlhf_fast/ops/_vocab.py)
//   bytes a row     of V columns of b bytes: forward V b read, 20 to 24 written; backward V b read, V b written
//   passes          one each way
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "gradients.h"

namespace rlhf_fast::cuda {

namespace {

struct Finish {
  MaskedLogprobs a;

  __device__ void operator()(int64_t row, int64_t, float inverse_temperature, const RowSums& sums,
                             float target_logit) const {
    RowResult result = finish_row(sums, target_logit, inverse_temperature);
    result.statistics.log_norm = at_most(result.statistics.log_norm, kFar);
    write(row, result);
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  __device__ void write(int64_t row, const RowResult& result) const {
    a.logprobs[row] = result.logprob;
    if (a.entropy) a.entropy[row] = result.entropy;
    ((RowStatistics*)a.statistics)[row] = result.statistics;
  }
};

struct Gradient {
  MaskedLogprobsBackward a;

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool) const {
    return row_slopes(((const RowStatistics*)a.statistics)[row], inverse_temperature, a.logprobs[row],
                      number_or_0(a.entropy, row), number_or_0(a.grad_logprobs, row), number_or_0(a.grad_entropy, row));
  }

  __device__ void skip(int64_t) const {}
};

}  // namespace

const char* masked_logprobs(const MaskedLogprobs& a, Scratch& scratch, void* stream) {
  // until a row is finished, its log-prob's place holds the target's logit
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 1, a.logprobs);
  if (scratch.size < scratch.needed) return nullptr;
  return typed(a.logits.dtype, [&](auto kind) {
    return sum<decltype(kind)>(a.rows, 1, a.logits, {}, swept, a.entropy, Finish{a}, stream);
  });
}

const char* masked_logprobs_backward(const MaskedLogprobsBackward& a, Scratch&, void* stream) {
  return typed(a.logits.dtype, [&](auto kind) {
    using T = decltype(kind);
    return write_gradient<T, T, false>(a.rows, a.logits, {}, a.grad, a.columns, Gradient{a}, stream);
  });
}

}  // namespace rlhf_fast::cuda
