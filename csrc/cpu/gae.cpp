// Generalised advantage estimation: one pass over each sequence, from its end.
//
// Each token depends on the next one through a fused multiply-add, whose latency bounds the loop. Masked tokens are
// skipped by a predicted branch, which adds nothing to that dependency chain; a select would lengthen it.
//
//   formula         A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, over the live tokens
//   bytes a token   8 read, 1 more with a mask; 8 written
//   passes          one, from the end; whitening follows
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

void run_sequence(const Gae& a, int64_t start, int64_t stop) {
  const float gamma = (float)a.gamma, gamma_lam = (float)(a.gamma * a.lam);
  float next_value = 0, next_advantage = 0;
  for (int64_t t = stop - 1; t >= start; t--) {
    if (a.live && !a.live[t]) {
      a.advantages[t] = a.returns[t] = 0;  // the carried values stay as they are
      continue;
    }
    next_advantage = gae_step(a.rewards[t], a.values[t], next_value, next_advantage, gamma, gamma_lam);
    next_value = a.values[t];
    a.advantages[t] = next_advantage;
    a.returns[t] = next_advantage + next_value;
  }
}

}  // namespace

void gae(const Gae& a, int threads) {
  const int64_t* bounds = a.cu_seqlens;
  const int64_t tokens = bounds ? bounds[a.sequences] : a.sequences * a.length;
  if (tokens == 0) return;
  parallel_for(a.sequences, tokens / a.sequences, threads, [&](int64_t i) {
    run_sequence(a, bounds ? bounds[i] : i * a.length, bounds ? bounds[i + 1] : (i + 1) * a.length);
  });
  if (a.whiten) {
    double statistics[3];
    masked_whiten({tokens, a.advantages, a.live, true, true, false, statistics, a.advantages}, threads);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
