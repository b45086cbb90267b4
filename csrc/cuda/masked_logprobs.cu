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

  __device__ RowResult operator()(int64_t row, int64_t, float inverse_temperature, const RowSums& sums,
                                  float target_logit) const {
    const RowResult result = finish_row(sums, target_logit, inverse_temperature);
    write(row, result);
    return result;
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  __device__ void write(int64_t row, const RowResult& result) const {
    write_outputs(a.outputs, row, result);
    RowStatistics statistics = result.statistics;
    statistics.log_norm = at_most(statistics.log_norm, kFar);
    ((RowStatistics*)a.statistics)[row] = statistics;
  }
};

struct FinishWithExtras {
  Finish first;

  __device__ void operator()(int64_t row, int64_t place, float inverse_temperature, const AllSums& sums,
                             float target_logit) const {
    const RowResult result = first(row, place, inverse_temperature, sums, target_logit);
    write_extras(first.a.outputs, row, first.a.rows.vocab, sums, target_logit, inverse_temperature, result);
  }

  __device__ void skip(int64_t row) const {
    first.skip(row);
    write_no_extras(first.a.outputs, row);
  }
};

struct Gradient {
  MaskedLogprobsBackward a;

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool) const {
    return row_slopes(((const RowStatistics*)a.statistics)[row], inverse_temperature, a.logprobs[row],
                      number_or_0(a.entropy, row), number_or_0(a.grad_logprobs, row), number_or_0(a.grad_entropy, row),
                      number_or_0(a.grad_logsumexp, row));
  }

  __device__ void skip(int64_t) const {}
};

}  // namespace

const char* masked_logprobs(const MaskedLogprobs& a, Scratch& scratch, void* stream) {
  // until a row is finished, its log-prob's place holds the target's logit
  const bool extras = a.outputs.logsumexp;
  float* target_logits = a.outputs.logprobs;
  const SegmentSums swept = extras ? take_segment_sums<AllSums>(scratch, a.rows, 1, target_logits)
                                   : take_segment_sums(scratch, a.rows, 1, target_logits);
  if (scratch.size < scratch.needed) return nullptr;
  return typed(a.logits.dtype, [&](auto kind) {
    using T = decltype(kind);
    if (extras) return sum_for_extras<T>(a.rows, a.logits, swept, FinishWithExtras{Finish{a}}, stream);
    return sum<T>(a.rows, 1, a.logits, {}, swept, a.outputs.entropy, Finish{a}, stream);
  });
}

const char* masked_logprobs_backward(const MaskedLogprobsBackward& a, Scratch&, void* stream) {
  return typed(a.logits.dtype, [&](auto kind) {
    using T = decltype(kind);
    return write_gradient<T, T, false>(a.rows, a.logits, {}, a.grad, a.columns, Gradient{a}, stream);
  });
}

}  // namespace rlhf_fast::cuda
