// Estimates of the KL from two log-probs a token.
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) evaluate(TokenKl a) {
  const Place place(a.live, a.tokens);
  const Four x = place.load(a.logprobs), y = place.load(a.ref_logprobs);
  place.store(a.kl, [&](int k) { return kl_value(a.estimator, x.at[k] - y.at[k]); });
}

__global__ void __launch_bounds__(kThreads) differentiate(TokenKlBackward a) {
  const Place place(a.live, a.tokens);
  const Four x = place.load(a.logprobs), y = place.load(a.ref_logprobs), upstream = place.load(a.grad_kl);
  place.store(a.grad, [&](int k) { return upstream.at[k] * kl_slope(a.slope, x.at[k] - y.at[k]); });
}

}  // namespace

const char* token_kl(const TokenKl& a, Scratch&, void* stream) {
  return launch(evaluate, ceil_div(a.tokens, kTile), kThreads, 0, stream, a);
}

const char* token_kl_backward(const TokenKlBackward& a, Scratch&, void* stream) {
  return launch(differentiate, ceil_div(a.tokens, kTile), kThreads, 0, stream, a);
}

const char* cannot_run() {
  cudaFuncAttributes attributes;
  return text(cudaFuncGetAttributes(&attributes, evaluate));
}

}  // namespace rlhf_fast::cuda
