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
    if (writes) write_outputs(a.outputs, row, result);
    return row_slopes(result.statistics, inverse_temperature, result.logprob, result.entropy,
                      a.grad_logprobs ? a.grad_logprobs[row] : 1, number_or_0(a.grad_entropy, row),
                      number_or_0(a.grad_logsumexp, row));
  }

  __device__ void skip(int64_t row) const { write_outputs(a.outputs, row, {}); }
};

// Keeps the sums for the gradient, and writes logsumexp and extras.
struct KeepAndWriteExtras {
  LinearLogprobs a;
  RowSums* sums;

  __device__ void operator()(int64_t row, int64_t place, float inverse_temperature, const AllSums& found,
                             float target_logit) const {
    sums[place] = found;
    const RowResult result = finish_row(found, target_logit, inverse_temperature);
    write_extras(a.outputs, row, a.rows.vocab, found, target_logit, inverse_temperature, result);
  }

  __device__ void skip(int64_t row) const { write_no_extras(a.outputs, row); }
};

}  // namespace

const char* linear_logprobs(const LinearLogprobs& a, Scratch& scratch, void* stream) {
  const bool extras = a.outputs.logsumexp;
  const SegmentSums swept =
      extras ? take_segment_sums<AllSums>(scratch, a.rows, 1) : take_segment_sums(scratch, a.rows, 1);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = extras ? sum_for_extras<float>(a.rows, a.logits, swept, KeepAndWriteExtras{a, swept.sums}, stream)
                             : sum<float>(a.rows, 1, a.logits, {}, swept, a.outputs.entropy || a.grad_entropy, stream);
  return error ? error : finish_tile<false>(a.rows, a.logits, {}, a.grad, TileLogprobs{a, swept}, stream);
}

}  // namespace rlhf_fast::cuda
