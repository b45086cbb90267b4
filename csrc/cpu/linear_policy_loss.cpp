// linear_policy_loss: the fold of a chunk of logits (rlhf_fast/ops/_sweep.py). Computes log-prob and entropy of each
// row. Then overwrites its logits with the gradient of clipped policy loss, KL to the reference and entropy bonus
// together. With the reference's logits the KL is exact, and the fold is that of linear_policy_ref.
//
//   formula         share * (max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H), by logit (policy_token, kl_slope)
//   bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient; with an
//                   exact KL as linear_policy_ref
//   passes          one, and one more for the gradient; with an exact KL two, and one more
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "pairs.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// d policy loss / d logprob of token i. The formulas take vectors; here all lanes have the same token.
float policy_slope(const LinearPolicyLoss& a, int64_t i, float logprob) {
  const float log_ratio = logprob - a.old_logprobs[i];
  const F32 ratio = exp(bounded_log_ratio(all(log_ratio)));
  return policy_token(all(log_ratio), ratio, all(a.advantages[i]), a.terms).slope[0];
}

// d (kl_coef * estimate of the KL) / d logprob of token i
float estimate_slope(const LinearPolicyLoss& a, int64_t i, float logprob) {
  if (a.terms.kl_coef == 0) return 0;
  return a.terms.kl_coef * kl_slope(a.terms.kl_slope, all(logprob - a.ref_logprobs[i]))[0];
}

// One row of logits, without a reference's.
void fold(const LinearPolicyLoss& a, int64_t i) {
  float* data = row_of<float>(a.logits, i);
  const Row row(data, a.rows.vocab, a.rows.targets[i], a.rows.softcap);
  const float inverse_temperature = inverse_temperature_of(a.rows, i);
  // 1. The results. The target's logit is read first, because the gradient may overwrite it.
  const float target_logit = row.target_logit();
  const RowResult result = evaluate_row(row, inverse_temperature, kEntropy);
  a.logprobs[i] = result.logprob;
  a.entropy[i] = result.entropy;
  // 2. The gradient, by the chain rule through log-prob and entropy.
  if (!a.grad.data) return;
  const float slope = policy_slope(a, i, result.logprob) + estimate_slope(a, i, result.logprob);
  typed(a.grad.data, a.grad.dtype, [&](auto* grads) {
    auto* grad = grads + i * a.grad.row_stride;
    write_row_gradient(row, a.rows.targets[i], target_logit, result.statistics, inverse_temperature, result.logprob,
                       result.entropy, {a.share[i] * slope, -a.share[i] * a.terms.entropy_coef, 0}, grad);
  });
}

void fold_with_reference(const LinearPolicyLoss& a, int64_t i) {
  fold_pair(a.rows, a.logits, a.ref_logits, a.grad, i, [&](const RowResult& p, const RowResult&, float kl) {
    a.logprobs[i] = p.logprob;
    a.entropy[i] = p.entropy;
    a.kl[i] = kl;
    const float share = a.share[i];
    return PairSlopes{share * policy_slope(a, i, p.logprob), -share * a.terms.entropy_coef, share * a.terms.kl_coef};
  });
}

}  // namespace

void linear_policy_loss(const LinearPolicyLoss& a, int threads) {
  if (a.ref_logits.data) {
    parallel_for(a.rows.length, 2 * a.rows.vocab, threads, [&](int64_t i) { fold_with_reference(a, i); });
  } else {
    parallel_for(a.rows.length, a.rows.vocab, threads, [&](int64_t i) { fold(a, i); });
  }
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
