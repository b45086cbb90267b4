// linear_logprobs and linear_cross_entropy: the fold of rows of logits (rlhf_fast/ops/_sweep.py) to log-probs, entropy
// and their gradient. Two launches: the first reads the logits for the sums, the second reads them again and overwrites
// them with the gradient.
//
//   formula         as masked_logprobs; the gradient is p_j times a factor of the row, except at the target
//   bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
//   passes          one, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "gradients.h"

namespace rlhf_fast::cuda {

namespace {

struct TileLogprobs {
  LinearLogprobs a;
  SegmentSums swept;

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const RowResult result = finish_row(a.rows, swept, row, 0, inverse_temperature);
    if (writes) write(row, result);
    return row_slopes(result.statistics, inverse_temperature, result.logprob, result.entropy,
                      a.grad_logprobs ? a.grad_logprobs[row] : 1, number_or_0(a.grad_entropy, row));
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  __device__ void write(int64_t row, const RowResult& result) const {
    a.logprobs[row] = result.logprob;
    if (a.entropy) a.entropy[row] = result.entropy;
  }
};

}  // namespace

const char* linear_logprobs(const LinearLogprobs& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 1);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = sum<float>(a.rows, 1, a.logits, {}, swept, a.entropy || a.grad_entropy, stream);
  return error ? error : finish_tile<false>(a.rows, a.logits, {}, a.grad, TileLogprobs{a, swept}, stream);
}

}  // namespace rlhf_fast::cuda
