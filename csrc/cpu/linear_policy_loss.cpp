// linear_policy_loss: the fold of a chunk of logits (rlhf_fast/ops/_sweep.py). Computes log-prob and entropy of each
// row. Then overwrites its logits with the gradient of clipped policy loss, KL to the reference and entropy bonus
// together.
//
//   formula         share * (max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H), by logit (policy_token, kl_slope)
//   bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
//   passes          one, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "rows.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// d (policy loss + kl_coef * KL) / d logprob of token i. The formulas take vectors; here all lanes have the same token.
float logprob_slope(const LinearPolicyLoss& a, int64_t i, float logprob) {
  const float log_ratio = logprob - a.old_logprobs[i];
  const F32 ratio = exp(bounded_log_ratio(all(log_ratio)));
  float slope = policy_token(all(log_ratio), ratio, all(a.advantages[i]), a.terms).slope[0];
  if (a.terms.kl_coef != 0) slope += a.terms.kl_coef * kl_slope(a.terms.kl_slope, all(logprob - a.ref_logprobs[i]))[0];
  return slope;
}

}  // namespace

void linear_policy_loss(const LinearPolicyLoss& a, int threads) {
  parallel_for(a.rows.length, a.rows.vocab, threads, [&](int64_t i) {
    float* data = row_of<float>(a.logits, i);
    const Row row(data, a.rows.vocab, a.rows.targets[i], a.rows.softcap);
    const float inverse_temperature = inverse_temperature_of(a.rows, i);
    // 1. The results. The target's logit is read first, because the gradient may overwrite it.
    const float target_logit = row.target_logit();
    const RowResult result = evaluate_row(row, inverse_temperature, true);
    a.logprobs[i] = result.logprob;
    a.entropy[i] = result.entropy;
    // 2. The gradient, by the chain rule through log-prob and entropy.
    if (!a.grad.data) return;
    typed(a.grad.data, a.grad.dtype, [&](auto* grads) {
      auto* grad = grads + i * a.grad.row_stride;
      write_row_gradient(row, a.rows.targets[i], target_logit, result.statistics, inverse_temperature, result.logprob,
                         result.entropy, a.share[i] * logprob_slope(a, i, result.logprob),
                         -a.share[i] * a.terms.entropy_coef, grad);
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
