// linear_policy_loss: the fold of rows of logits (rlhf_fast/ops/_sweep.py) to log-probs, entropies, and the gradient of
// clipped policy loss, KL to the reference and entropy bonus together. Two launches: the first reads the logits for the
// sums, the second reads them again and overwrites them with the gradient.
//
//   formula         share * (max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H), by logit (policy_token, kl_slope)
//   bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
//   passes          one, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "gradients.h"

namespace rlhf_fast::cuda {

namespace {

struct TilePolicyLoss {
  LinearPolicyLoss a;
  SegmentSums swept;

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const RowResult result = finish_row(a.rows, swept, row, 0, inverse_temperature);
    if (writes) write(row, result);
    // the chain rule through log-prob and entropy
    const float share = a.share[row];
    return row_slopes(result.statistics, inverse_temperature, result.logprob, result.entropy,
                      share * logprob_slope(row, result.logprob), -share * a.terms.entropy_coef);
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  // d (policy loss + kl_coef * KL) / d logprob
  __device__ float logprob_slope(int64_t row, float logprob) const {
    const float log_ratio = logprob - a.old_logprobs[row];
    const float ratio = expf(bounded_log_ratio(log_ratio));
    float slope = policy_token(log_ratio, ratio, a.advantages[row], a.terms).slope;
    if (a.terms.kl_coef != 0) slope += a.terms.kl_coef * kl_slope(a.terms.kl_slope, logprob - a.ref_logprobs[row]);
    return slope;
  }

  __device__ void write(int64_t row, const RowResult& result) const {
    a.logprobs[row] = result.logprob;
    a.entropy[row] = result.entropy;
  }
};

}  // namespace

const char* linear_policy_loss(const LinearPolicyLoss& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 1);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = sum<float>(a.rows, 1, a.logits, {}, swept, true, stream);
  return error ? error : finish_tile<false>(a.rows, a.logits, {}, a.grad, TilePolicyLoss{a, swept}, stream);
}

}  // namespace rlhf_fast::cuda
