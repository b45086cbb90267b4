// Estimates of the KL from two log-probs per token: one pass forward, one backward.
//
//   formula         value and slope of the table in rlhf_fast/ops/token_kl.py, d = logprob - ref_logprob
//   bytes a token   forward 8 read, 4 written; backward 12 read, 4 written; 1 more read with a mask
//   passes          one each way
//   error           1 ulp of the difference; k3 to a few ulps, although exp(x) - 1 - x cancels
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) evaluate(TokenKl a) {
  const ThreadTokens tokens(a.live, a.tokens, {a.logprobs, a.ref_logprobs});
  const Values4 &x = tokens.of[0], &y = tokens.of[1];
  tokens.store(a.kl, [&](int k) { return kl_value(a.estimator, x.at[k] - y.at[k]); });
}

__global__ void __launch_bounds__(kThreads) differentiate(TokenKlBackward a) {
  const ThreadTokens tokens(a.live, a.tokens, {a.logprobs, a.ref_logprobs, a.grad_kl});
  const Values4 &x = tokens.of[0], &y = tokens.of[1], &upstream = tokens.of[2];
  tokens.store(a.grad, [&](int k) { return upstream.at[k] * kl_slope(a.slope, x.at[k] - y.at[k]); });
}

}  // namespace

const char* token_kl(const TokenKl& a, Scratch&, void* stream) {
  return launch(evaluate, ceil_div(a.tokens, kTile), kThreads, 0, stream, a);
}

const char* token_kl_backward(const TokenKlBackward& a, Scratch&, void* stream) {
  return launch(differentiate, ceil_div(a.tokens, kTile), kThreads, 0, stream, a);
}

// Queries a kernel's attributes. That fails if the module has no code for this GPU or the driver is too old.
const char* cannot_run() {
  cudaFuncAttributes attributes;
  return text(cudaFuncGetAttributes(&attributes, evaluate));
}

}  // namespace rlhf_fast::cuda
