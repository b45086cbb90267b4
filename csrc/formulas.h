// The token-level formulas, once for every machine: F is a vector on the CPU and float in a CUDA thread.
// Each is the formula of the torch reference of the same name in rlhf_fast/ops.
//
// They use + - * / and comparisons and, for F, where(condition, a, b), expm1 and abs. So this file is included INSIDE
// the namespace that defines those (rlhf_fast::<path> in cpu/vec.h, rlhf_fast::cuda in cuda/), and is part of it.

#ifdef __CUDACC__
#define RLHF_FAST_FORMULA __host__ __device__ __forceinline__
#else
#define RLHF_FAST_FORMULA inline __attribute__((always_inline))
#endif

// exp(x) - 1 - x to a few units in the last place: where it would cancel, its series, exact to float at |x| < 1/2.
template <class F>
RLHF_FAST_FORMULA F k3(F x) {
  F tail = 1.0f + x * (1.0f / 9);
  tail = 1.0f + x * (1.0f / 8) * tail;
  tail = 1.0f + x * (1.0f / 7) * tail;
  tail = 1.0f + x * (1.0f / 6) * tail;
  tail = 1.0f + x * (1.0f / 5) * tail;
  tail = 1.0f + x * (1.0f / 4) * tail;
  tail = 1.0f + x * (1.0f / 3) * tail;
  // the bound keeps inf - inf out; wherever it acts, exp(x) is infinite already
  const F bounded = where(x > 1000.0f, F{} + 1000.0f, x);
  return where(abs(x) < 0.5f, 0.5f * x * x * tail, expm1(x) - bounded);
}

// After a switch over all codes, one of which the compiler would miss (-Werror=switch): NaN for a code of another
// build.
template <class F>
RLHF_FAST_FORMULA F no_formula() {
  return F{} + __builtin_nanf("");
}

// d = logprob - ref_logprob.
template <class F>
RLHF_FAST_FORMULA F kl_value(Kl estimator, F d) {
  switch (estimator) {
    case Kl::k1: return d;
    case Kl::k2: return 0.5f * d * d;
    case Kl::k3: return k3(-d);
    case Kl::abs: return abs(d);
  }
  return no_formula<F>();
}

// d value / d logprob; that of abs is 0 at NaN, as torch.sign is.
template <class F>
RLHF_FAST_FORMULA F kl_slope(Kl estimator, F d) {
  switch (estimator) {
    case Kl::k1: return F{} + 1.0f;
    case Kl::k2: return d;
    case Kl::k3: return -expm1(-d);
    case Kl::abs: return where(d > 0.0f, F{} + 1.0f, where(d < 0.0f, F{} - 1.0f, F{}));
  }
  return no_formula<F>();
}

// The log ratio is held within +-20; NaN passes.
constexpr float kLogRatioBound = 20.0f;

template <class F>
RLHF_FAST_FORMULA F bounded_log_ratio(F log_ratio) {
  log_ratio = where(log_ratio > kLogRatioBound, F{} + kLogRatioBound, log_ratio);
  return where(log_ratio < -kLogRatioBound, F{} - kLogRatioBound, log_ratio);
}

template <class F>
struct LossToken {
  F loss;
  F slope;    // of the loss by the log-prob or the value: 0 where the clipped branch is in force
  F clipped;  // 1 where it is, else 0, NaN or not
};

// The bounds of a ratio, each rounded once.
RLHF_FAST_FORMULA float lowest_ratio(const PolicyTerms& terms) { return (float)(1 - (double)terms.clip_low); }

RLHF_FAST_FORMULA float highest_ratio(const PolicyTerms& terms) { return (float)(1 + (double)terms.clip_high); }

// PPO's clipped loss of a token. `log_ratio` is its own and not yet bounded; `ratio` is that of its bounded log ratio,
// or its sequence's. dual_clip is +inf for none. At a tie, and at the very ceiling, the unclipped branch is in force.
template <class F>
RLHF_FAST_FORMULA LossToken<F> policy_token(F log_ratio, F ratio, F advantage, float low, float high, float dual_clip) {
  F held = where(ratio < low, F{} + low, ratio);
  held = where(held > high, F{} + high, held);
  const F unclipped = -advantage * ratio;
  const F at_bound = -advantage * held;
  const F ceiling = -advantage * dual_clip;
  const auto outside = at_bound > unclipped;
  const F loss = where(outside, at_bound, unclipped);
  const auto over = (advantage < 0.0f) & (loss > ceiling);
  const auto clipped = outside | over;
  const auto constant = clipped | (abs(log_ratio) > kLogRatioBound);
  return {where(over, ceiling, loss), where(constant, F{}, unclipped), where(clipped, F{} + 1.0f, F{})};
}

// 0.5 * max((v - R)^2, (clip(v) - R)^2); clip is +inf for none. At a tie the unclipped branch is in force.
template <class F>
RLHF_FAST_FORMULA LossToken<F> value_token(F value, F old_value, F target, float clip) {
  F held = where(value < old_value - clip, old_value - clip, value);
  held = where(held > old_value + clip, old_value + clip, held);
  const F error = value - target;
  const F held_error = held - target;
  const F squared = error * error;
  const F held_squared = held_error * held_error;
  const auto clipped = held_squared > squared;
  return {0.5f * where(clipped, held_squared, squared), where(clipped, F{}, error), where(clipped, F{} + 1.0f, F{})};
}

// One step backwards in time: the advantage of a token from the next live token's value and advantage.
template <class F>
RLHF_FAST_FORMULA F gae_step(F reward, F value, F next_value, F next_advantage, float gamma, float gamma_lam) {
  return reward + gamma * next_value - value + gamma_lam * next_advantage;
}

// What a token adds to the one before it. With g_t = gamma * value_t + gamma_lam * advantage_t,
//
//     advantage_t = reward_t - value_t + g_{t+1}  and  g_t = gain_t + gamma_lam * g_{t+1},
//
// one number to carry instead of two. `gamma_rest` is gamma - gamma_lam, taken before the rounding, so that values
// cancel exactly at lam = 1. An infinite value makes NaN of all before it, as in the reference.
template <class F>
RLHF_FAST_FORMULA F gae_gain(F reward, F value, float gamma_lam, float gamma_rest) {
  return gamma_lam * reward + gamma_rest * value + (value - value);
}
