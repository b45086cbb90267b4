// linear_policy_ref: the fold of rows of the policy's and the reference's logits (rlhf_fast/ops/_sweep.py) to both
// log-probs, the policy's entropy, the exact KL, and the gradient of their weighted sum. Three launches: the sums of
// both rows, the terms of the KL, and the gradient, which overwrites the policy's logits.
//
//   formula         those of masked_logprobs and exact_kl
//   bytes a row     of V columns: 8 V read for the sums, 8 V for the KL, 8 V read, up to 4 V written for the gradient
//   passes          two, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "pairs.h"

namespace rlhf_fast::cuda {

namespace {

struct PolicyRefResults {
  LinearPolicyRef a;

  __device__ PairSlopes slopes(int64_t row, float) const {
    return {number_or_0(a.grad_logprobs, row), number_or_0(a.grad_entropy, row), number_or_0(a.grad_kl, row)};
  }

  __device__ void write(int64_t row, const RowResult& p, const RowResult& r, float kl) const {
    a.logprobs[row] = p.logprob;
    a.ref_logprobs[row] = r.logprob;
    a.entropy[row] = p.entropy;
    a.kl[row] = kl;
  }
};

}  // namespace

const char* linear_policy_ref(const LinearPolicyRef& a, Scratch& scratch, void* stream) {
  return fold_pairs(a.rows, a.logits, a.ref_logits, a.grad, PolicyRefResults{a}, scratch, stream);
}

}  // namespace rlhf_fast::cuda
