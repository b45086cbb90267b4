// linear_policy_ref: the fold of two chunks of logits, the policy's and the reference's (rlhf_fast/ops/_sweep.py).
// Computes both log-probs, the policy's entropy and the exact KL. Then overwrites the policy's logits with the gradient
// of their weighted sum.
//
//   formula         those of masked_logprobs and exact_kl
//   bytes a row     of V columns: 8 V read for the sums, 8 V for the KL, 8 V read, up to 4 V written for the gradient
//   passes          two, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "pairs.h"

namespace rlhf_fast::RLHF_FAST_PATH {
namespace {

Normaliser normaliser_of(const RowResult& result) { return {result.statistics.shift, result.statistics.scale}; }

// The target's term of the KL, p log(p / r) - p + r, in double. kl_terms computes those of the other columns.
double kl_at_target(double log_p, double log_r) {
  const double p = std::exp(log_p), r = std::exp(log_r), ratio = log_r - log_p;
  if (p == 0) return r;
  return ratio <= 1 ? p * (std::expm1(ratio) - ratio) : r - p - p * ratio;
}

// d KL / d target's logit, before softcap and temperature.
float kl_slope_at_target(float log_p, float log_r, float kl) {
  const float p = std::exp(log_p);
  return p == 0 ? 0 : p * (log_p - log_r - kl);
}

}  // namespace

void linear_policy_ref(const LinearPolicyRef& a, int threads) {
  parallel_for(a.rows.length, 2 * a.rows.vocab, threads, [&](int64_t i) {
    float* data = row_of<float>(a.logits, i);
    const int64_t target = a.rows.targets[i];
    const Row policy(data, a.rows.vocab, target, a.rows.softcap);
    const Row reference(row_of<float>(a.ref_logits, i), a.rows.vocab, target, a.rows.softcap);
    const float inverse_temperature = inverse_temperature_of(a.rows, i);
    // 1. Both softmaxes. The target's logit is read first, because the gradient may overwrite it.
    const float target_logit = policy.target_logit();
    const RowResult p = evaluate_row(policy, inverse_temperature, true);
    const RowResult r = evaluate_row(reference, inverse_temperature, false);
    // 2. The KL: the target's term plus those of the other columns.
    const Pair pair(policy, reference, normaliser_of(p), normaliser_of(r), (float)(p.log_norm - r.log_norm),
                    inverse_temperature);
    const float kl = (float)(kl_at_target(p.logprob, r.logprob) + pair.kl());
    a.logprobs[i] = p.logprob;
    a.ref_logprobs[i] = r.logprob;
    a.entropy[i] = p.entropy;
    a.kl[i] = kl;
    // 3. The gradient. If the KL has none, the reference is not read again.
    if (!a.grad.data) return;
    const float grad_logprob = a.grad_logprobs[i], grad_entropy = a.grad_entropy[i], grad_kl = a.grad_kl[i];
    typed(a.grad.data, a.grad.dtype, [&](auto* grads) {
      auto* grad = grads + i * a.grad.row_stride;
      if (grad_kl == 0) {
        return write_row_gradient(policy, target, target_logit, p.statistics, inverse_temperature, p.logprob, p.entropy,
                                  grad_logprob, grad_entropy, grad);
      }
      // p_j times (-grad_logprob - grad_entropy (log p_j + entropy) + grad_kl (log p_j - log r_j - KL))
      const float constant = grad_entropy * (p.statistics.log_norm - p.entropy) - grad_logprob - grad_kl * kl;
      pair.write_gradient(inverse_temperature * constant, -inverse_temperature * grad_entropy,
                          -inverse_temperature * grad_kl, grad);
      write_target_gradient(policy, target, target_logit, inverse_temperature,
                            target_slope(p.statistics, p.logprob, p.entropy, grad_logprob, grad_entropy) +
                                grad_kl * kl_slope_at_target(p.logprob, r.logprob, kl),
                            grad);
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
