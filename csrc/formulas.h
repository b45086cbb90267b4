// The token-level formulas, shared by the CPU (F is a vector) and CUDA (F is a float, one token per thread). They
// compute the same as the torch references in rlhf_fast/ops.
//
// F needs arithmetic, comparisons, and the functions where(condition, a, b), at_least and at_most, which keep NaN, abs,
// reciprocal, bounded_exp, which is e^x for x <= 87, and half_power, described at Exponential. This file is included
// INSIDE the namespace that defines them: rlhf_fast::<path> in cpu/vec.h, rlhf_fast::cuda in cuda/scalar.h.

#ifdef __CUDACC__
#define RLHF_FAST_FORMULA __host__ __device__ __forceinline__
#else
#define RLHF_FAST_FORMULA inline __attribute__((always_inline))
#endif

// e^x = 2 half (1 + rest + tail). Near 0, half = 1/2, rest = x and tail = e^x - 1 - x, so that nothing cancels.
template <class F>
struct Exponential {
  F half;  // 2^(n - 1) for an integer n; 2^n itself may be 2^128, which is not a float. 0 for x < -86.99
  F rest;  // x - n log 2, in +-log(2) / 2
  F tail;  // e^rest - 1 - rest

  RLHF_FAST_FORMULA F value() const { return 2.0f * (half * (rest + tail) + half); }
  RLHF_FAST_FORMULA F minus_1() const { return 2.0f * (half * (rest + tail) + (half - 0.5f)); }
  // e^x - 1 - x to a few ulp
  RLHF_FAST_FORMULA F minus_1_and(F x) const {
    return 2.0f * (half * tail + ((half * rest + (half - 0.5f)) - 0.5f * x));
  }
};

constexpr float kLog2E = 1.44269504f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
constexpr float kOverflow = 89.0f;       // e^x is infinite here

// For x <= kOverflow. half_power(kRounder + n) is 2^(n - 1), and 0 for n = -126.
template <class F>
RLHF_FAST_FORMULA Exponential<F> split_exponential(F x) {
  // 1. x = n log 2 + r. log 2 is split in two parts: n times the first is exact, so that r is accurate.
  x = at_least(x, F{} - 87.0f);
  const F shifted = x * kLog2E + kRounder;
  const F n = shifted - kRounder;
  F r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  // 2. e^r - 1 - r = r^2 p(r)
  F p = r * 1.9875691e-4f + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 0.5f;
  return {half_power(shifted), r, p * (r * r)};
}

// NaN for an invalid code. The switches have no default, so that -Werror=switch rejects a missing case; this is reached
// only if the caller passes a code of another build.
template <class F>
RLHF_FAST_FORMULA F no_formula() {
  return F{} + __builtin_nanf("");
}

// The estimate of the KL from d = logprob - ref_logprob.
template <class F>
RLHF_FAST_FORMULA F kl_value(Kl estimator, F d) {
  switch (estimator) {
    case Kl::k1: return d;
    case Kl::k2: return 0.5f * d * d;
    case Kl::k3: {
      const F x = at_most(-d, F{} + kOverflow);  // infinity - infinity would be NaN
      return split_exponential(x).minus_1_and(x);
    }
    case Kl::abs: return abs(d);
  }
  return no_formula<F>();
}

// d value / d logprob. The slope of abs is 0 at NaN, like torch.sign.
template <class F>
RLHF_FAST_FORMULA F kl_slope(Kl estimator, F d) {
  switch (estimator) {
    case Kl::k1: return F{} + 1.0f;
    case Kl::k2: return d;
    case Kl::k3: return -split_exponential(at_most(-d, F{} + kOverflow)).minus_1();
    case Kl::abs: return where(d > 0.0f, F{} + 1.0f, where(d < 0.0f, F{} - 1.0f, F{}));
  }
  return no_formula<F>();
}

// The log ratio is clamped to +-20, so that its exponential stays finite. NaN is kept.
constexpr float kLogRatioBound = 20.0f;

template <class F>
RLHF_FAST_FORMULA F bounded_log_ratio(F log_ratio) {
  log_ratio = where(log_ratio > kLogRatioBound, F{} + kLogRatioBound, log_ratio);
  return where(log_ratio < -kLogRatioBound, F{} - kLogRatioBound, log_ratio);
}

template <class F>
struct LossToken {
  F loss;
  F slope;    // d loss / d log-prob or value: 0 where the loss is clipped
  F clipped;  // 1 where the loss is clipped, else 0; never NaN
};

// PPO's clipped loss of a token. `log_ratio` is the token's, not clamped. `ratio` is exp of the clamped log ratio, or
// the ratio of the token's sequence. A tie, or a loss equal to the ceiling, is not clipped.
template <class F>
RLHF_FAST_FORMULA LossToken<F> policy_token(F log_ratio, F ratio, F advantage, const PolicyTerms& terms) {
  const float low = 1.0f - terms.clip_low, high = 1.0f + terms.clip_high;
  F clipped_ratio = where(ratio < low, F{} + low, ratio);
  clipped_ratio = where(clipped_ratio > high, F{} + high, clipped_ratio);
  const F unclipped = -advantage * ratio;
  const F at_bound = -advantage * clipped_ratio;
  const F ceiling = -advantage * terms.dual_clip;
  const auto outside = at_bound > unclipped;
  const F loss = where(outside, at_bound, unclipped);
  const auto over = (advantage < 0.0f) & (loss > ceiling);
  const auto clipped = outside | over;
  // d ratio / d logprob = ratio, so the slope of the unclipped loss is the loss itself. If the ratio is clipped or the
  // log ratio clamped, the loss does not depend on the log-prob.
  const auto constant = clipped | (abs(log_ratio) > kLogRatioBound);
  return {where(over, ceiling, loss), where(constant, F{}, unclipped), where(clipped, F{} + 1.0f, F{})};
}

// 0.5 * max((v - R)^2, (clip(v) - R)^2). A tie is not clipped.
template <class F>
RLHF_FAST_FORMULA LossToken<F> value_token(F value, F old_value, F target, const ValueTerms& terms) {
  const F lowest = old_value - terms.clip, highest = old_value + terms.clip;
  F clipped_value = where(value < lowest, lowest, value);
  clipped_value = where(clipped_value > highest, highest, clipped_value);
  const F error = value - target;
  const F clipped_error = clipped_value - target;
  const F squared = error * error;
  const F clipped_squared = clipped_error * clipped_error;
  const auto clipped = clipped_squared > squared;
  return {0.5f * where(clipped, clipped_squared, squared), where(clipped, F{}, error), where(clipped, F{} + 1.0f, F{})};
}

// One step of GAE, backwards in time: the advantage of a token from the value and the advantage of the next live token.
template <class F>
RLHF_FAST_FORMULA F gae_step(F reward, F value, F next_value, F next_advantage, float gamma, float gamma_lam) {
  return reward + gamma * next_value - value + gamma_lam * next_advantage;
}

// The gain of a token in the recurrence of GAE. With g_t = gamma * value_t + gamma_lam * advantage_t,
//
//     advantage_t = reward_t - value_t + g_{t+1}
//     g_t         = gain_t + gamma_lam * g_{t+1}
//
// so that only one number is carried from token to token. `gamma_rest` is gamma - gamma_lam, subtracted in double, so
// that it is exactly 0 at lam = 1. The term value - value is NaN for an infinite value, which makes all earlier tokens
// NaN, as in the torch reference.
template <class F>
RLHF_FAST_FORMULA F gae_gain(F reward, F value, float gamma_lam, float gamma_rest) {
  return gamma_lam * reward + gamma_rest * value + (value - value);
}

// ---- gated activations: a(x) * up ------------------------------------------------------------------------------------

template <class F>
struct Activated {
  F value;  // a(x)
  F slope;  // a'(x)
};

// x * sigmoid(u); `rise` is du/dx. bounded_exp keeps 1 - sigmoid(u) = e^-u sigmoid(u) finite.
template <class F>
RLHF_FAST_FORMULA Activated<F> sigmoid_gate(F x, F u, F rise) {
  const F e = bounded_exp(-u), sigmoid = reciprocal(1.0f + e), value = x * sigmoid;
  return {value, sigmoid + value * (e * sigmoid) * rise};
}

// Phi(x), the normal distribution function. For x < 0 it is erfc(|x| / sqrt(2)) / 2 with a relative error of 1.2e-7
// (Press et al., Numerical Recipes, 2nd edition, section 6.2), else 1 minus that. `bell` is e^(-x^2 / 2).
template <class F>
RLHF_FAST_FORMULA F normal_share(F x, F bell) {
  const F t = reciprocal(1.0f + abs(x) * 0.353553391f);
  F p = F{} + 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const F tail = 0.5f * t * bell * bounded_exp(p);
  return where(x < 0.0f, tail, 1.0f - tail);
}

template <class F>
RLHF_FAST_FORMULA Activated<F> activate(Activation activation, F x) {
  switch (activation) {
    case Activation::silu: return sigmoid_gate(x, x, F{} + 1.0f);
    case Activation::gelu_tanh: {
      // (1 + tanh(z)) / 2 = sigmoid(2 z), 2 z = sqrt(8 / pi) (x + 0.044715 x^3); for |x| > 30 it is 0 or 1
      F near = where(x > 30.0f, F{} + 30.0f, x);
      near = where(x < -30.0f, F{} - 30.0f, near);
      const F square = near * near;
      return sigmoid_gate(x, 1.59576912f * near * (1.0f + 0.044715f * square), 1.59576912f + 0.214064449f * square);
    }
    case Activation::gelu: {
      const F bell = bounded_exp(-0.5f * x * x), share = normal_share(x, bell);
      return {x * share, share + 0.398942280f * x * bell};
    }
    case Activation::relu: return {where(x <= 0.0f, F{}, x), where(x <= 0.0f, F{}, F{} + 1.0f)};
  }
  return {no_formula<F>(), no_formula<F>()};
}
