// One sentence: what it computes of each token.
//
//   formula         sample_op_value and sample_op_slope of csrc/formulas.h
//   bytes a token   forward 4 read, 4 written; backward 8 read, 4 written; 1 more read where there is a mask
//   passes          one each way
//   error           1 ulp
#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// Calls visit(i, lanes, live, x) for each vector; x is 0 where the token does not count.
template <class Arguments, class Visit>
RLHF_FAST_INLINE void over_tokens(const Arguments& a, int threads, const Visit& visit) {
  parallel_for(blocks_of(a.tokens), kBlock, threads, [&](int64_t block) {
    over_vectors(block * kBlock, smaller((block + 1) * kBlock, a.tokens), [&](int64_t i, int lanes) {
      const I32 live = live_lanes(a.live, i, lanes);
      visit(i, lanes, live, kept(live, load(a.x + i, lanes)));
    });
  });
}

}  // namespace

void sample_op(const SampleOp& a, int threads) {
  over_tokens(a, threads, [&](int64_t i, int lanes, I32 live, F32 x) {
    store(a.y + i, kept(live, sample_op_value(x, a.scale)), lanes);
  });
}

void sample_op_backward(const SampleOpBackward& a, int threads) {
  over_tokens(a, threads, [&](int64_t i, int lanes, I32 live, F32 x) {
    store(a.grad + i, kept(live, load(a.grad_y + i, lanes) * sample_op_slope(x, a.scale)), lanes);
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
