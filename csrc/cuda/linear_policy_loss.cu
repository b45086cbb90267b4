// linear_policy_loss: the fold of rows of logits (rlhf_fast/ops/_sweep.py) to log-probs, entropies, and the gradient of
// clipped policy loss, KL to the reference and entropy bonus together. Two launches: the first reads the logits for the
// sums, the second reads them again and overwrites them with the gradient. With the reference's logits the KL is exact,
// and the launches are those of linear_policy_ref.
//
//   formula         share * (max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H), by logit (policy_token, kl_slope)
//   bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient; with an
//                   exact KL as linear_policy_ref
//   passes          one, and one more for the gradient; with an exact KL two, and one more
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "pairs.h"

namespace rlhf_fast::cuda {

namespace {

// d policy loss / d logprob
__device__ inline float policy_slope(const LinearPolicyLoss& a, int64_t row, float logprob) {
  const float log_ratio = logprob - a.old_logprobs[row];
  const float ratio = expf(bounded_log_ratio(log_ratio));
  return policy_token(log_ratio, ratio, a.advantages[row], a.terms).slope;
}

struct TilePolicyLoss {
  LinearPolicyLoss a;
  SegmentSums swept;

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const RowResult result = finish_row(a.rows, swept, row, 0, inverse_temperature);
    if (writes) write(row, result);
    // the chain rule through log-prob and entropy
    const float share = a.share[row], logprob = result.logprob;
    float slope = policy_slope(a, row, logprob);
    if (a.terms.kl_coef != 0) slope += a.terms.kl_coef * kl_slope(a.terms.kl_slope, logprob - a.ref_logprobs[row]);
    return row_slopes(result.statistics, inverse_temperature, logprob, result.entropy, share * slope,
                      -share * a.terms.entropy_coef);
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  __device__ void write(int64_t row, const RowResult& result) const {
    a.logprobs[row] = result.logprob;
    a.entropy[row] = result.entropy;
  }
};

struct PolicyLossResults {
  LinearPolicyLoss a;

  __device__ PairSlopes slopes(int64_t row, float logprob) const {
    const float share = a.share[row];
    return {share * policy_slope(a, row, logprob), -share * a.terms.entropy_coef, share * a.terms.kl_coef};
  }

  __device__ void write(int64_t row, const RowResult& p, const RowResult&, float kl) const {
    a.logprobs[row] = p.logprob;
    a.entropy[row] = p.entropy;
    a.kl[row] = kl;
  }
};

}  // namespace

const char* linear_policy_loss(const LinearPolicyLoss& a, Scratch& scratch, void* stream) {
  if (a.ref_logits.data) {
    return fold_pairs(a.rows, a.logits, a.ref_logits, a.grad, PolicyLossResults{a}, scratch, stream);
  }
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 1);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = sum<float>(a.rows, 1, a.logits, {}, swept, true, stream);
  return error ? error : finish_tile<false>(a.rows, a.logits, {}, a.grad, TilePolicyLoss{a, swept}, stream);
}

}  // namespace rlhf_fast::cuda
