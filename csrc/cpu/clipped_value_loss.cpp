// PPO's clipped value loss and its gradient in one sweep over the tokens.
#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

struct ValueSums {
  float count, loss, clipped;
};

// Writes the gradient of the tokens [start, end).
ValueSums evaluate_block(const ClippedValueLoss& a, int64_t length, int64_t start, int64_t end, const Shares& shares) {
  F32 losses{}, counts{}, clipped{};
  over_sequences(length, start, end, [&](int64_t sequence, int64_t from, int64_t to) {
    const float share = shares.of(sequence);
    over_vectors(from, to, [&](int64_t i, int lanes) {
      const I32 live = live_lanes(a.live, i, lanes);
      const LossToken<F32> token =
          value_token(kept(live, load(a.values + i, lanes)), kept(live, load(a.old_values + i, lanes)),
                      kept(live, load(a.returns + i, lanes)), a.clip);
      losses += token.loss * share;
      counts += kept(live, all(1));
      clipped += token.clipped;
      if (a.grad) store(a.grad + i, kept(live, token.slope * share), lanes);
    });
  });
  return {sum(counts), sum(losses), sum(clipped)};
}

}  // namespace

void clipped_value_loss(const ClippedValueLoss& a) {
  const Shares shares(a);
  const int64_t tokens = a.sequences * a.length;
  const int64_t length = shares.differ ? a.length : tokens;  // where all sequences are alike, their bounds do not matter
  const Array<ValueSums> blocks(blocks_of(tokens));
  parallel_for(blocks_of(tokens), kBlock, a.threads, [&](int64_t i) {
    blocks[i] = evaluate_block(a, length, i * kBlock, smaller((i + 1) * kBlock, tokens), shares);
  });

  double count = 0, loss = 0, clipped = 0;
  for (int64_t i = 0; i < blocks_of(tokens); i++) {
    count += blocks[i].count;
    loss += blocks[i].loss;
    clipped += blocks[i].clipped;
  }
  *a.loss = (float)loss;
  *a.clip_fraction = (float)(clipped / (count > 0 ? count : 1));
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
