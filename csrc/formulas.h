// The token-level formulas, once for every machine: F is a vector on the CPU and float in a CUDA thread.
// Each is the formula of the torch reference of the same name in rlhf_fast/ops.
//
// They use + - * / and comparisons and, for F, where(condition, a, b), expm1 and abs. So this file is included INSIDE the
// namespace that defines those (rlhf_fast::<path> in cpu/vec.h, rlhf_fast::cuda in cuda/), and is part of it.

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
  const F bounded = where(x > 1000.0f, x * 0.0f + 1000.0f, x);
  return where(abs(x) < 0.5f, 0.5f * x * x * tail, expm1(x) - bounded);
}

// d = logprob - ref_logprob.
template <class F>
RLHF_FAST_FORMULA F kl_value(Kl estimator, F d) {
  switch (estimator) {
    case Kl::k1: return d;
    case Kl::k2: return 0.5f * d * d;
    case Kl::k3: return k3(-d);
    default: return abs(d);
  }
}

template <class F>
RLHF_FAST_FORMULA F kl_slope(Kl estimator, F d) {
  const F zero = d * 0.0f;
  switch (estimator) {
    case Kl::k1: return zero + 1.0f;
    case Kl::k2: return d;
    case Kl::k3: return -expm1(-d);
    default: return where(d > 0.0f, zero + 1.0f, where(d < 0.0f, zero - 1.0f, d));
  }
}

// The log ratio is held within +-20; NaN passes.
constexpr float kLogRatioBound = 20.0f;

template <class F>
RLHF_FAST_FORMULA F bounded_log_ratio(F log_ratio) {
  const F zero = log_ratio * 0.0f;
  log_ratio = where(log_ratio > kLogRatioBound, zero + kLogRatioBound, log_ratio);
  return where(log_ratio < -kLogRatioBound, zero - kLogRatioBound, log_ratio);
}

template <class F>
struct PolicyToken {
  F loss;
  F slope;    // d loss / d logprob, were the ratio's own slope (ratio) not bounded: see policy_token
  F clipped;  // 1 where the clipped branch is the one in force, else 0
};

// PPO's clipped loss of a token whose ratio is given. At a tie the unclipped branch is in force.
// dual_clip is +inf for none.
template <class F>
RLHF_FAST_FORMULA PolicyToken<F> policy_token(F ratio, F advantage, float low, float high, float dual_clip) {
  const F zero = ratio * 0.0f;
  F held = where(ratio < low, zero + low, ratio);
  held = where(held > high, zero + high, held);
  const F unclipped = -advantage * ratio;
  const F at_bound = -advantage * held;
  F loss = where(at_bound > unclipped, at_bound, unclipped);
  F clipped = where(at_bound > unclipped, zero + 1.0f, zero);
  const F ceiling = -advantage * dual_clip;
  const auto over = (advantage < 0.0f) & (loss > ceiling);
  loss = where(over, ceiling, loss);
  clipped = where(over, zero + 1.0f, clipped);
  return {loss, where(clipped > 0.0f, zero, unclipped), clipped};
}

template <class F>
struct ValueToken {
  F loss;
  F slope;
  F clipped;
};

// 0.5 * max((v - R)^2, (clip(v) - R)^2); clip is +inf for none. At a tie the unclipped branch is in force.
template <class F>
RLHF_FAST_FORMULA ValueToken<F> value_token(F value, F old_value, F target, float clip) {
  const F zero = value * 0.0f;
  const F error = value - target;
  F held = where(value < old_value - clip, old_value - clip, value);
  held = where(held > old_value + clip, old_value + clip, held);
  const F held_error = held - target;
  const F squared = error * error;
  const F held_squared = held_error * held_error;
  const auto outside = held_squared > squared;
  return {0.5f * where(outside, held_squared, squared), where(outside, zero, error),
          where(outside, zero + 1.0f, zero)};
}

// One step backwards in time: the advantage of a token from the next live token's value and advantage.
template <class F>
RLHF_FAST_FORMULA F gae_step(F reward, F value, F next_value, F next_advantage, float gamma, float gamma_lam) {
  return reward + gamma * next_value - value + gamma_lam * next_advantage;
}
