// PPO's clipped loss, its gradient and its statistics in one sweep over the tokens.
#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// Sums over the live tokens of a block, or of all blocks so far.
struct PolicySums {
  double count, loss, clipped, squared_log_ratio;
  double ratio_mean, ratio_deviation;  // the mean, and the sum of squared deviations from it
  float ratio_max;
};

// The log ratios from token i on, and which of them count.
struct LogRatios {
  I32 live;
  F32 unbounded, bounded;  // 0 where not live

  RLHF_FAST_INLINE LogRatios(const ClippedPolicyLoss& a, int64_t i, int lanes)
      : live(live_lanes(a.live, i, lanes)),
        unbounded(kept(live, load(a.logprobs + i, lanes) - load(a.old_logprobs + i, lanes))),
        bounded(bounded_log_ratio(unbounded)) {}
};

// exp(mean log ratio over the live tokens [start, end)).
float sequence_ratio(const ClippedPolicyLoss& a, int64_t start, int64_t end) {
  double total = 0, count = 0;
  for (; start < end; start += kBlock) {
    F32 totals{}, counts{};
    over_vectors(start, smaller(start + kBlock, end), [&](int64_t i, int lanes) {
      const LogRatios log_ratios(a, i, lanes);
      totals += log_ratios.bounded;
      counts += kept(log_ratios.live, all(1));
    });
    total += sum(totals);
    count += sum(counts);
  }
  return exp(all((float)(total / (count > 0 ? count : 1))))[0];
}

// Writes the gradient of the tokens [start, end).
PolicySums evaluate_block(const ClippedPolicyLoss& a, int64_t length, int64_t start, int64_t end, const Shares& shares,
                          const Array<float>& sequence_ratios) {
  const float low = lowest_ratio(a), high = highest_ratio(a);
  alignas(64) float ratios[kBlock + kLanes];
  F32 losses{}, counts{}, clipped{}, squared{}, totals{}, peaks{};
  over_sequences(length, start, end, [&](int64_t sequence, int64_t from, int64_t to) {
    const float share = shares.of(sequence);
    const F32 shared_ratio = all(a.sequence_level ? sequence_ratios[sequence] : 0);
    over_vectors(from, to, [&](int64_t i, int lanes) {
      const LogRatios log_ratios(a, i, lanes);
      const I32 live = log_ratios.live;
      const F32 ratio = kept(live, a.sequence_level ? shared_ratio : exp(log_ratios.bounded));
      const F32 advantage = kept(live, load(a.advantages + i, lanes));
      const LossToken<F32> token = policy_token(log_ratios.unbounded, ratio, advantage, low, high, a.dual_clip);
      losses += token.loss * share;
      counts += kept(live, all(1));
      clipped += token.clipped;
      squared += log_ratios.bounded * log_ratios.bounded;
      totals += ratio;
      peaks = larger(ratio, peaks);
      store(ratios + (i - start), ratio);
      if (a.grad) store(a.grad + i, kept(live, token.slope * share), lanes);
    });
  });

  // Deviations from the rounded mean also tell how far off it is.
  const double count = sum(counts), divisor = count > 0 ? count : 1;
  const float near_mean = (float)(sum(totals) / divisor);
  F32 deviations{}, squared_deviations{};
  over_vectors(start, end, [&](int64_t i, int lanes) {
    const F32 deviation = kept(live_lanes(a.live, i, lanes), load(ratios + (i - start)) - near_mean);
    deviations += deviation;
    squared_deviations += deviation * deviation;
  });
  const double off = sum(deviations) / divisor;
  const double deviation = sum(squared_deviations) - count * off * off;
  return {count,           sum(losses),    sum(clipped), sum(squared), near_mean + off, deviation < 0 ? 0 : deviation,
          largest(peaks)};
}

}  // namespace

void clipped_policy_loss(const ClippedPolicyLoss& a) {
  const Shares shares(a);
  const Array<float> sequence_ratios(a.sequence_level ? a.sequences : 0);
  if (a.sequence_level) {
    parallel_for(a.sequences, a.length, a.threads, [&](int64_t sequence) {
      sequence_ratios[sequence] = sequence_ratio(a, sequence * a.length, (sequence + 1) * a.length);
    });
  }
  const int64_t tokens = a.sequences * a.length;
  // where all sequences are alike, their bounds do not matter
  const int64_t length = shares.differ || a.sequence_level ? a.length : tokens;
  const Array<PolicySums> blocks(blocks_of(tokens));
  parallel_for(blocks_of(tokens), kBlock, a.threads, [&](int64_t i) {
    blocks[i] =
        evaluate_block(a, length, i * kBlock, smaller((i + 1) * kBlock, tokens), shares, sequence_ratios);
  });

  PolicySums total{};
  for (int64_t i = 0; i < blocks_of(tokens); i++) {
    const PolicySums& block = blocks[i];
    if (block.count == 0) continue;
    const double before = total.count, step = block.ratio_mean - total.ratio_mean;
    total.count += block.count;
    total.loss += block.loss;
    total.clipped += block.clipped;
    total.squared_log_ratio += block.squared_log_ratio;
    total.ratio_mean += step * (block.count / total.count);
    total.ratio_deviation += block.ratio_deviation + step * step * (before * block.count / total.count);
    total.ratio_max = block.ratio_max > total.ratio_max ? block.ratio_max : total.ratio_max;
  }
  const double count = total.count > 0 ? total.count : 1;
  *a.loss = (float)total.loss;
  a.statistics[0] = (float)(total.clipped / count);
  a.statistics[1] = (float)(0.5 * total.squared_log_ratio / count);
  a.statistics[2] = (float)total.ratio_mean;
  // a NaN, which no comparison takes for the largest, is in the mean
  a.statistics[3] = total.ratio_mean == total.ratio_mean ? total.ratio_max : (float)total.ratio_mean;
  a.statistics[4] = (float)(total.ratio_deviation / count);
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
