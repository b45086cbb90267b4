// The folds of the ops with an lm head: a tile of float32 logits, fresh from its matrix product, gives the log-probs of
// its rows and becomes their gradient, in place or narrower elsewhere. A block of the gradient's sweep joins its row's
// sums by itself, so that a fold takes two launches, and three where the KL needs a sweep between.
#include "gradients.h"
#include "pairs.h"

namespace rlhf_fast::cuda {

namespace {

struct FoldLogprobs {
  LinearLogprobs a;
  SegmentSums swept;

  __device__ Slopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const RowResult result = finish_row(a.rows, swept, row, 0, inverse_temperature);
    if (writes) write(row, result);
    return row_slopes(result.statistics, inverse_temperature, result.logprob, result.entropy,
                      a.grad_logprobs ? a.grad_logprobs[row] : 1, number_of(a.grad_entropy, row));
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  __device__ void write(int64_t row, const RowResult& result) const {
    a.logprobs[row] = result.logprob;
    if (a.entropy) a.entropy[row] = result.entropy;
  }
};

struct FoldPolicyLoss {
  LinearPolicyLoss a;
  SegmentSums swept;

  __device__ Slopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const RowResult result = finish_row(a.rows, swept, row, 0, inverse_temperature);
    if (writes) write(row, result);
    const float share = a.share[row];
    return row_slopes(result.statistics, inverse_temperature, result.logprob, result.entropy,
                      share * logprob_slope(row, result.logprob), -share * a.entropy_coef);
  }

  __device__ void skip(int64_t row) const { write(row, {}); }

  // d (policy loss + kl_coef * KL) / d logprob
  __device__ float logprob_slope(int64_t row, float logprob) const {
    const float log_ratio = logprob - a.old_logprobs[row];
    const float ratio = expf(bounded_log_ratio(log_ratio));
    float slope =
        policy_token(log_ratio, ratio, a.advantages[row], lowest_ratio(a), highest_ratio(a), a.dual_clip).slope;
    if (a.kl_coef != 0) slope += a.kl_coef * kl_slope(a.kl_slope, logprob - a.ref_logprobs[row]);
    return slope;
  }

  __device__ void write(int64_t row, const RowResult& result) const {
    a.logprobs[row] = result.logprob;
    a.entropy[row] = result.entropy;
  }
};

struct FoldPolicyRef {
  LinearPolicyRef a;
  SegmentSums swept;
  const float* terms;

  struct Results {
    RowResult p, r;
    Normalisers normalisers;
  };

  __device__ Results results(int64_t row, float inverse_temperature) const {
    const RowResult p = finish_row(a.rows, swept, row, 0, inverse_temperature);
    const RowResult r = finish_row(a.rows, swept, row, 1, inverse_temperature);
    return {p, r, {p.statistics.shift, p.statistics.scale, r.statistics.shift, r.statistics.scale,
                   p.statistics.log_norm - r.statistics.log_norm}};
  }

  __device__ Normalisers normalisers(int64_t row, float inverse_temperature) const {
    return results(row, inverse_temperature).normalisers;
  }

  __device__ Slopes operator()(int64_t row, float inverse_temperature, bool writes) const {
    const auto [p, r, n] = results(row, inverse_temperature);
    const float p_target = expf(p.logprob);
    const float kl = kl_term(p_target, r.logprob - p.logprob, expf(r.logprob)) + join_terms(terms, swept.segments, row);
    if (writes) write(row, p, r, kl);
    Slopes slopes = row_slopes(p.statistics, inverse_temperature, p.logprob, p.entropy, number_of(a.grad_logprobs, row),
                               number_of(a.grad_entropy, row));
    const float pull = number_of(a.grad_kl, row) * inverse_temperature;
    slopes.ref_shift = n.ref_shift;
    slopes.offset = n.offset;
    slopes.ratio_slope = -pull * n.scale;
    if (pull != 0) {
      slopes.constant += slopes.ratio_slope * kl;
      if (p_target != 0) slopes.at_target += pull * p_target * (p.logprob - r.logprob - kl);
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

Logits float_logits(float* data, int64_t row_stride) { return {data, DType::f32, row_stride}; }

// The rows' outputs, and the gradient where it is wanted.
template <bool kPair, class Op>
const char* end_fold(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad, const Op& op,
                     void* stream) {
  if (!grad.data) return finish(rows, op, stream);
  return typed(grad.dtype, [&](auto kind) {
    return write_gradient<float, decltype(kind), kPair>(rows, logits, ref_logits, grad, rows.vocab, op, stream);
  });
}

}  // namespace

const char* linear_logprobs(const LinearLogprobs& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 1);
  if (scratch.size < scratch.needed) return nullptr;
  const Logits logits = float_logits(a.logits, a.row_stride);
  const char* error = sum<float>(a.rows, 1, logits, {}, swept, a.entropy || a.grad_entropy, stream);
  return error ? error : end_fold<false>(a.rows, logits, {}, a.grad, FoldLogprobs{a, swept}, stream);
}

const char* linear_policy_loss(const LinearPolicyLoss& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 1);
  if (scratch.size < scratch.needed) return nullptr;
  const Logits logits = float_logits(a.logits, a.row_stride);
  const char* error = sum<float>(a.rows, 1, logits, {}, swept, true, stream);
  return error ? error : end_fold<false>(a.rows, logits, {}, a.grad, FoldPolicyLoss{a, swept}, stream);
}

const char* linear_policy_ref(const LinearPolicyRef& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 2);
  float* terms = take<float>(scratch, a.rows.count * swept.segments);
  if (scratch.size < scratch.needed) return nullptr;
  const Logits logits = float_logits(a.logits, a.row_stride);
  const Logits ref_logits = float_logits(a.ref_logits, a.ref_row_stride);
  const FoldPolicyRef op{a, swept, terms};
  const char* error = sum<float>(a.rows, 2, logits, ref_logits, swept, true, stream);
  if (!error) error = sum_kl<float>(a.rows, logits, ref_logits, terms, swept.segments, op, stream);
  return error ? error : end_fold<true>(a.rows, logits, ref_logits, a.grad, op, stream);
}

}  // namespace rlhf_fast::cuda
