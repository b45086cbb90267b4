// linear_policy_ref: the fold of rows of the policy's and the reference's logits (rlhf_fast/ops/_sweep.py) to both
// log-probs, the policy's entropy, the exact KL, and the gradient of their weighted sum. Three launches: the sums of
// both rows, the terms of the KL, and the gradient, which overwrites the policy's logits.
//
//   formula         those of masked_logprobs and exact_kl
//   bytes a row     of V columns: 8 V read for the sums, 8 V for the KL, 8 V read, up to 4 V written for the gradient
//   passes          two, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "gradients.h"
#include "pairs.h"

namespace rlhf_fast::cuda {

namespace {

struct TilePolicyRef {
  LinearPolicyRef a;
  SegmentSums swept;
  const float* terms;

  // Recomputed by each launch that needs them: a few loads per block instead of one more launch.
  struct Results {
    RowResult p, r;
    Normalisers normalisers;
  };

  __device__ Results results(int64_t row, float inverse_temperature) const {
    const RowResult p = finish_row(a.rows, swept, row, 0, inverse_temperature);
    const RowResult r = finish_row(a.rows, swept, row, 1, inverse_temperature);
    const float offset = p.statistics.log_norm - r.statistics.log_norm;
    return {p, r, {p.statistics.shift, p.statistics.scale, r.statistics.shift, r.statistics.scale, offset}};
  }

  __device__ Normalisers normalisers(int64_t row, float inverse_temperature) const {
    return results(row, inverse_temperature).normalisers;
  }

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const auto [p, r, n] = results(row, inverse_temperature);
    // 1. The KL: the target's term plus those of the other columns.
    const float p_target = expf(p.logprob);
    const float kl = kl_term(p_target, r.logprob - p.logprob, expf(r.logprob)) + join_terms(terms, swept.segments, row);
    if (writes) write(row, p, r, kl);
    // 2. The slopes. An infinite KL with a gradient of 0 must add 0, not NaN; and 0 * log 0 = 0.
    RowSlopes slopes = row_slopes(p.statistics, inverse_temperature, p.logprob, p.entropy,
                                  number_or_0(a.grad_logprobs, row), number_or_0(a.grad_entropy, row));
    const float scaled_grad = number_or_0(a.grad_kl, row) * inverse_temperature;
    slopes.ref_shift = n.ref_shift;
    slopes.offset = n.offset;
    slopes.ratio_slope = -scaled_grad * n.scale;
    if (scaled_grad != 0) {
      slopes.constant += slopes.ratio_slope * kl;
      if (p_target != 0) slopes.at_target += scaled_grad * p_target * (p.logprob - r.logprob - kl);
    }
    return slopes;
  }

  __device__ void skip(int64_t row) const { write(row, {}, {}, 0); }

  __device__ void write(int64_t row, const RowResult& p, const RowResult& r, float kl) const {
    a.logprobs[row] = p.logprob;
    a.ref_logprobs[row] = r.logprob;
    a.entropy[row] = p.entropy;
    a.kl[row] = kl;
  }
};

}  // namespace

const char* linear_policy_ref(const LinearPolicyRef& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 2);
  float* terms = take<float>(scratch, a.rows.length * swept.segments);
  if (scratch.size < scratch.needed) return nullptr;
  const TilePolicyRef op{a, swept, terms};
  const char* error = sum<float>(a.rows, 2, a.logits, a.ref_logits, swept, true, stream);
  if (!error) error = sum_kl<float>(a.rows, a.logits, a.ref_logits, terms, swept.segments, op, stream);
  return error ? error : finish_tile<true>(a.rows, a.logits, a.ref_logits, a.grad, op, stream);
}

}  // namespace rlhf_fast::cuda
