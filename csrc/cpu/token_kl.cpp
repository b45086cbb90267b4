// Estimates of the KL from two log-probs per token: one pass forward, one backward.
//
//   formula         value and slope of the table in rlhf_fast/ops/token_kl.py, d = logprob - ref_logprob
//   bytes a token   forward 8 read, 4 written; backward 12 read, 4 written; 1 more read with a mask
//   passes          one each way
//   error           1 ulp of the difference; k3 to a few ulps, although exp(x) - 1 - x cancels
#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// Calls visit(i, lanes, live, d) for each vector; d is logprob - ref_logprob, or 0 where a token does not count. Every
// estimate is 0 at d = 0, so the forward needs no further mask.
template <class Arguments, class Visit>
RLHF_FAST_INLINE void over_differences(const Arguments& a, int threads, const Visit& visit) {
  parallel_for(blocks_of(a.tokens), kBlock, threads, [&](int64_t block) {
    over_vectors(block * kBlock, smaller((block + 1) * kBlock, a.tokens), [&](int64_t i, int lanes) {
      const I32 live = live_lanes(a.live, i, lanes);
      visit(i, lanes, live, kept(live, load(a.logprobs + i, lanes) - load(a.ref_logprobs + i, lanes)));
    });
  });
}

}  // namespace

void token_kl(const TokenKl& a, int threads) {
  over_differences(a, threads,
                   [&](int64_t i, int lanes, I32, F32 d) { store(a.kl + i, kl_value(a.estimator, d), lanes); });
}

void token_kl_backward(const TokenKlBackward& a, int threads) {
  over_differences(a, threads, [&](int64_t i, int lanes, I32 live, F32 d) {
    store(a.grad + i, kept(live, load(a.grad_kl + i, lanes) * kl_slope(a.slope, d)), lanes);
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
