// One sentence: what it computes of each token.
//
//   formula         sample_op_value and sample_op_slope of csrc/formulas.h
//   bytes a token   forward 4 read, 4 written; backward 8 read, 4 written; 1 more read where there is a mask
//   passes          one each way
//   error           1 ulp
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

__global__ void __launch_bounds__(kThreads) evaluate(SampleOp a) {
  const ThreadTokens tokens(a.live, a.tokens, {a.x});
  const Values4& x = tokens.of[0];
  tokens.store(a.y, [&](int k) { return sample_op_value(x.at[k], a.scale); });
}

__global__ void __launch_bounds__(kThreads) differentiate(SampleOpBackward a) {
  const ThreadTokens tokens(a.live, a.tokens, {a.x, a.grad_y});
  const Values4 &x = tokens.of[0], &upstream = tokens.of[1];
  tokens.store(a.grad, [&](int k) { return upstream.at[k] * sample_op_slope(x.at[k], a.scale); });
}

}  // namespace

const char* sample_op(const SampleOp& a, Scratch&, void* stream) {
  return launch(evaluate, ceil_div(a.tokens, kTile), kThreads, 0, stream, a);
}

const char* sample_op_backward(const SampleOpBackward& a, Scratch&, void* stream) {
  return launch(differentiate, ceil_div(a.tokens, kTile), kThreads, 0, stream, a);
}

}  // namespace rlhf_fast::cuda
