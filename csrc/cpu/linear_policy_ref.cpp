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

void linear_policy_ref(const LinearPolicyRef& a, int threads) {
  parallel_for(a.rows.length, 2 * a.rows.vocab, threads, [&](int64_t i) {
    fold_pair(a.rows, a.logits, a.ref_logits, a.grad, i, [&](const RowResult& p, const RowResult& r, float kl) {
      a.logprobs[i] = p.logprob;
      a.ref_logprobs[i] = r.logprob;
      a.entropy[i] = p.entropy;
      a.kl[i] = kl;
      return a.grad.data ? PairSlopes{a.grad_logprobs[i], a.grad_entropy[i], a.grad_kl[i]} : PairSlopes{};
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
