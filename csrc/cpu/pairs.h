// Two rows of logits read together, x of the policy and y of the reference: KL(policy || reference) and its gradient.
// The formulas are those of rlhf_fast/ops/exact_kl.py, over all columns except the target, which reads as -inf in both.
#pragma once

#include "rows.h"

namespace rlhf_fast::RLHF_FAST_PATH {

// p_j = e^((x_j - shift) / temperature) * scale
struct Normaliser {
  float shift, scale;
};

// p log(p / r) - p + r, with ratio = log(r / p) and r = e^ref_gap * ref_scale.
//
// Each lane computes only one exponential: e^ratio for ratio <= 1, where p * (e^ratio - 1 - ratio) does not cancel,
// else e^ref_gap.
RLHF_FAST_INLINE F32 kl_terms(F32 p, F32 ratio, F32 ref_gap, float ref_scale) {
  ratio = where(p == 0.0f, all(2.0f), ratio);  // log p is -inf: select the branch r - p - p * ratio, which gives r
  const I32 near = ratio <= 1.0f;
  const Exponential<F32> e = split_exponential(where(near, ratio, ref_gap));
  return where(near, p * e.minus_1_and(ratio), e.value() * ref_scale - p - p * ratio);
}

template <class T>
class Pair {
 public:
  // `offset` is log(r.scale / p.scale). The caller computes it so that it is accurate where both are close to 1.
  Pair(const Row<T>& policy, const Row<T>& reference, const Normaliser& p, const Normaliser& r, float offset,
       float inverse_temperature)
      : policy_(policy),
        reference_(reference),
        p_(p),
        r_(r),
        inverse_temperature_(inverse_temperature),
        rate_(kLog2E * inverse_temperature),
        offset_(offset) {}

  // The sum of p log(p / r) - p + r. No term is negative, so nothing cancels.
  double kl() const {
    double total = 0;
    over_blocks_of_both([&](int64_t, int count, const auto* x, const auto* y) __attribute__((always_inline)) {
      F32 terms{};
      for (int i = 0; i < count; i += kLanes) {
        const F32 logit = load(x + i), ref_logit = load(y + i);
        const F32 p = probability(p_, logit);
        terms += kl_terms(p, log_ratio(logit, ref_logit), gap(r_, ref_logit), r_.scale);
      }
      total += sum(terms);
    });
    return total;
  }

  // p_j * (constant + slope * (x_j - shift) / temperature + ratio_slope * log(r_j / p_j)), times the derivative of the
  // softcap. `grad` may be the policy's row: a vector is read before it is written.
  template <class Out>
  void write_gradient(float constant, float slope, float ratio_slope, Out* grad) const {
    const float inverse_softcap = policy_.softcap() == 0 ? 0 : 1 / policy_.softcap();
    over_blocks_of_both([&](int64_t start, int count, const auto* x, const auto* y) __attribute__((always_inline)) {
      over_vectors(0, count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32 logit = load(x + i);
        const F32 p = probability(p_, logit), ratio = log_ratio(logit, load(y + i));
        F32 g = p * (constant + slope * gap(p_, logit) + ratio_slope * ratio);
        if (inverse_softcap != 0) g *= 1.0f - (logit * inverse_softcap) * (logit * inverse_softcap);
        store(grad + start + i, where(p == 0.0f, F32{}, g), lanes);
      });
    });
  }

 private:
  RLHF_FAST_INLINE F32 gap(const Normaliser& of, F32 logit) const { return (logit - of.shift) * inverse_temperature_; }
  RLHF_FAST_INLINE F32 probability(const Normaliser& of, F32 logit) const {
    return exp2_scaled(logit - of.shift, rate_) * of.scale;
  }
  // log(r_j / p_j). Subtracts the gaps first and divides by the temperature afterwards, so equal rows give exactly 0.
  RLHF_FAST_INLINE F32 log_ratio(F32 logit, F32 ref_logit) const {
    return ((ref_logit - r_.shift) - (logit - p_.shift)) * inverse_temperature_ + offset_;
  }

  template <class Visit>
  RLHF_FAST_INLINE void over_blocks_of_both(const Visit& visit) const {
    alignas(64) float scratch[kRowBlock], ref_scratch[kRowBlock];
    over_blocks(policy_.vocab(), [&](int64_t start, int count) __attribute__((always_inline)) {
      policy_.visit_block(start, count, scratch, [&](const auto* x) __attribute__((always_inline)) {
        reference_.visit_block(start, count, ref_scratch,
                               [&](const auto* y) __attribute__((always_inline)) { visit(start, count, x, y); });
      });
    });
  }

  const Row<T>&policy_, &reference_;
  Normaliser p_, r_;
  float inverse_temperature_, rate_, offset_;
};

// ---- a fold of two chunks of float32 logits -------------------------------------------------------------------------

RLHF_FAST_INLINE Normaliser normaliser_of(const RowResult& result) {
  return {result.statistics.shift, result.statistics.scale};
}

// The target's term of the KL, p log(p / r) - p + r, in double. kl_terms computes those of the other columns.
RLHF_FAST_INLINE double kl_at_target(double log_p, double log_r) {
  const double p = std::exp(log_p), r = std::exp(log_r), ratio = log_r - log_p;
  if (p == 0) return r;
  return ratio <= 1 ? p * (std::expm1(ratio) - ratio) : r - p - p * ratio;
}

// d KL / d target's logit, before softcap and temperature.
RLHF_FAST_INLINE float kl_slope_at_target(float log_p, float log_r, float kl) {
  const float p = std::exp(log_p);
  return p == 0 ? 0 : p * (log_p - log_r - kl);
}

// The upstream gradients of a row's results.
struct PairSlopes {
  float logprob, entropy, kl;
};

// Computes the results of row i, passes them to write(policy, reference, kl), which returns the PairSlopes, and writes
// the gradient to `grad` if it is wanted, which may be the policy's logits.
template <class Write>
RLHF_FAST_INLINE void fold_pair(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad,
                                int64_t i, const Write& write) {
  float* data = row_of<float>(logits, i);
  const int64_t target = rows.targets[i];
  const Row policy(data, rows.vocab, target, rows.softcap);
  const Row reference(row_of<float>(ref_logits, i), rows.vocab, target, rows.softcap);
  const float inverse_temperature = inverse_temperature_of(rows, i);
  // 1. Both softmaxes. The target's logit is read first, because the gradient may overwrite it.
  const float target_logit = policy.target_logit();
  const RowResult p = evaluate_row(policy, inverse_temperature, kEntropy);
  const RowResult r = evaluate_row(reference, inverse_temperature, kLogprob);
  // 2. The KL: the target's term plus those of the other columns.
  const Pair pair(policy, reference, normaliser_of(p), normaliser_of(r), (float)(p.log_norm - r.log_norm),
                  inverse_temperature);
  const float kl = (float)(kl_at_target(p.logprob, r.logprob) + pair.kl());
  const PairSlopes slopes = write(p, r, kl);
  // 3. The gradient. If the KL has none, the reference is not read again.
  if (!grad.data) return;
  typed(grad.data, grad.dtype, [&](auto* grads) {
    auto* out = grads + i * grad.row_stride;
    const OutputGrads by_outputs{slopes.logprob, slopes.entropy, 0};
    if (slopes.kl == 0) {
      return write_row_gradient(policy, target, target_logit, p.statistics, inverse_temperature, p.logprob, p.entropy,
                                by_outputs, out);
    }
    // p_j times (-slopes.logprob - slopes.entropy (log p_j + entropy) + slopes.kl (log p_j - log r_j - KL))
    const float constant = slopes.entropy * (p.statistics.log_norm - p.entropy) - slopes.logprob - slopes.kl * kl;
    pair.write_gradient(inverse_temperature * constant, -inverse_temperature * slopes.entropy,
                        -inverse_temperature * slopes.kl, out);
    write_target_gradient(policy, target, target_logit, inverse_temperature,
                          target_slope(p.statistics, p.logprob, p.entropy, by_outputs) +
                              slopes.kl * kl_slope_at_target(p.logprob, r.logprob, kl),
                          out);
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
