// PPO's joint loss, its gradients and its statistics in one pass over the tokens. Without values it is the clipped
// policy loss, and without log-probs the clipped value loss.
//
//   formula         max(-A r, -A clip(r)) + value_coef (v - R)^2 / 2, clipped, + kl_coef KL - entropy_coef H
//   bytes a token   4 read of each given tensor, 1 of a mask; 4 written of each gradient. Backward: 8 of each gradient
//                   where the gradient of the loss is not 1
//   passes          one; one more before it for ratios per sequence or a count; one in the backward
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// Sums over the live tokens of a block, or of all blocks so far. Losses are weighted by the shares of the tokens.
struct Sums {
  double count, policy, kl, entropy, value;
  double clipped, value_clipped, squared_log_ratio;
  double ratio_mean, ratio_deviation;  // the mean, and the sum of squared deviations from it
  float ratio_max;
};

// The log ratios of tokens i to i + lanes - 1, and which of them count.
struct LogRatios {
  I32 live;
  F32 unbounded, bounded;  // 0 where not live

  RLHF_FAST_INLINE LogRatios(const PpoLoss& a, int64_t i, int lanes)
      : live(live_lanes(a.live, i, lanes)),
        unbounded(kept(live, load(a.logprobs + i, lanes) - load(a.old_logprobs + i, lanes))),
        bounded(bounded_log_ratio(unbounded)) {}
};

// exp of the mean log ratio over the live tokens in [start, end). Sums are float within a block and double over blocks.
float sequence_ratio(const PpoLoss& a, int64_t start, int64_t end) {
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

// A number near the ratios of the block that begins at `start`: the mean of its first vector.
float near_ratio(const PpoLoss& a, int64_t start, int64_t end) {
  const int lanes = (int)smaller(end - start, kLanes);
  const LogRatios log_ratios(a, start, lanes);
  const float count = sum(kept(log_ratios.live, all(1)));
  return count > 0 ? sum(kept(log_ratios.live, exp(log_ratios.bounded))) / count : 1;
}

// The sums of the tokens [start, end), and their gradients. kPolicy and kValue: whether the loss has these terms;
// kKl: the estimate of the KL, if there is a reference.
template <bool kPolicy, bool kValue, bool kReference, Kl kKl>
Sums evaluate_block(const PpoLoss& given, int64_t length, int64_t start, int64_t end, const Shares& shares,
                    const Array<float>& sequence_ratios) {
  constexpr bool kJoint = kPolicy && kValue;  // the clipped policy loss alone has neither KL nor entropy
  const PpoLoss a = given;                    // a copy, which no store can change, stays in registers
  float near = 0;
  if (kPolicy) near = a.sequence_level ? sequence_ratios[start / length] : near_ratio(a, start, end);
  F32 counts{}, policy{}, kl{}, entropy{}, value{}, clipped{}, value_clipped{}, squared{}, peaks{};
  F32 deviations{}, squared_deviations{};
  over_sequences(length, start, end, [&](int64_t sequence, int64_t from, int64_t to) {
    const float share = shares.of(sequence);
    const F32 shared_ratio = all(a.sequence_level ? sequence_ratios[sequence] : 0);
    // inlined by force: GCC would call it for each vector, with the sums in memory
    over_vectors(from, to, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const I32 live = live_lanes(a.live, i, lanes);
      const auto at = [&](const float* data) { return kept(live, load(data + i, lanes)); };
      counts += kept(live, all(1));
      if (kPolicy) {
        const LogRatios log_ratios(a, i, lanes);
        const F32 ratio = kept(live, a.sequence_level ? shared_ratio : exp(log_ratios.bounded));
        const LossToken<F32> token = policy_token(log_ratios.unbounded, ratio, at(a.advantages), a.terms);
        policy += token.loss * share;
        clipped += token.clipped;
        squared += log_ratios.bounded * log_ratios.bounded;
        peaks = larger(ratio, peaks);
        const F32 deviation = kept(live, ratio - near);
        deviations += deviation;
        squared_deviations += deviation * deviation;
        F32 slope = token.slope;
        if (kReference) {
          const F32 d = kept(live, load(a.logprobs + i, lanes) - load(a.ref_logprobs + i, lanes));
          kl += kl_value(kKl, d) * share;
          // the slope is that of the estimate itself or, for a "+" estimate, that of k2
          if (a.terms.kl_coef != 0) slope += a.terms.kl_coef * kl_slope(a.terms.kl_slope == kKl ? kKl : Kl::k2, d);
        }
        if (a.grad_logprobs) store(a.grad_logprobs + i, kept(live, slope * share), lanes);
      }
      if (kJoint && a.entropy) {
        entropy += at(a.entropy) * share;
        if (a.grad_entropy) store(a.grad_entropy + i, kept(live, all(-a.terms.entropy_coef * share)), lanes);
      }
      if (kValue) {
        const LossToken<F32> token = value_token(at(a.values), at(a.old_values), at(a.returns), a.value_terms);
        value += token.loss * share;
        value_clipped += token.clipped;
        if (a.grad_values) store(a.grad_values + i, kept(live, token.slope * (a.value_terms.coef * share)), lanes);
      }
    });
  });

  Sums sums{};
  sums.count = sum(counts);
  sums.policy = sum(policy);
  sums.kl = sum(kl);
  sums.entropy = sum(entropy);
  sums.value = sum(value);
  sums.clipped = sum(clipped);
  sums.value_clipped = sum(value_clipped);
  sums.squared_log_ratio = sum(squared);
  sums.ratio_max = largest(peaks);
  if (kPolicy && sums.count > 0) {
    // From deviations, because a sum of squares would cancel for ratios near 1.
    const double off = sum(deviations) / sums.count;
    const double deviation = sum(squared_deviations) - sums.count * off * off;
    sums.ratio_mean = near + off;
    sums.ratio_deviation = deviation < 0 ? 0 : deviation;
  }
  return sums;
}

// The loop for these terms.
auto evaluation_of(const PpoLoss& a) {
  if (!a.value) return evaluate_block<true, false, false, Kl::k1>;
  if (!a.policy) return evaluate_block<false, true, false, Kl::k1>;
  if (!a.ref_logprobs) return evaluate_block<true, true, false, Kl::k1>;
  switch (a.terms.kl) {
    case Kl::k1: return evaluate_block<true, true, true, Kl::k1>;
    case Kl::k2: return evaluate_block<true, true, true, Kl::k2>;
    case Kl::k3: return evaluate_block<true, true, true, Kl::k3>;
    case Kl::abs: break;
  }
  return evaluate_block<true, true, true, Kl::abs>;
}

// Adds a block to the sums so far. Means and squared deviations are merged by Chan's formula.
void add(Sums& total, const Sums& block) {
  if (block.count == 0) return;
  const double before = total.count, step = block.ratio_mean - total.ratio_mean;
  total.count += block.count;
  total.policy += block.policy;
  total.kl += block.kl;
  total.entropy += block.entropy;
  total.value += block.value;
  total.clipped += block.clipped;
  total.value_clipped += block.value_clipped;
  total.squared_log_ratio += block.squared_log_ratio;
  total.ratio_mean += step * (block.count / total.count);
  total.ratio_deviation += block.ratio_deviation + step * step * (before * block.count / total.count);
  total.ratio_max = block.ratio_max > total.ratio_max ? block.ratio_max : total.ratio_max;
}

// A term with coefficient 0 adds 0, even if it is infinite.
double term(double coef, double value) { return coef != 0 ? coef * value : 0; }

}  // namespace

void ppo_loss(const PpoLoss& a, int threads) {
  // 1. The numbers per sequence: the share and, with sequence_level, the ratio.
  const Shares shares(a, threads);
  const Array<float> sequence_ratios(a.sequence_level ? a.sequences : 0);
  if (a.sequence_level) {
    parallel_for(a.sequences, a.length, threads, [&](int64_t sequence) {
      sequence_ratios[sequence] = sequence_ratio(a, sequence * a.length, (sequence + 1) * a.length);
    });
  }
  // 2. Gradients and sums, block by block. Blocks do not follow sequence boundaries. If nothing depends on sequences,
  //    the tokens are treated as one long sequence.
  const int64_t tokens = a.sequences * a.length;
  const int64_t length = shares.differ || a.sequence_level ? a.length : tokens;
  const auto evaluate = evaluation_of(a);
  const Array<Sums> blocks(blocks_of(tokens));
  parallel_for(blocks_of(tokens), kBlock, threads, [&](int64_t i) {
    blocks[i] = evaluate(a, length, i * kBlock, smaller((i + 1) * kBlock, tokens), shares, sequence_ratios);
  });

  // 3. The loss and the statistics.
  Sums total{};
  for (int64_t i = 0; i < blocks_of(tokens); i++) add(total, blocks[i]);
  const double count = total.count > 0 ? total.count : 1;
  const double loss = total.policy + term(a.value_terms.coef, total.value) + term(a.terms.kl_coef, total.kl);
  *a.loss = (float)(loss - term(a.terms.entropy_coef, total.entropy));
  // the maximum ignores NaN; the mean does not
  const double ratio_max = total.ratio_mean == total.ratio_mean ? total.ratio_max : total.ratio_mean;
  float* out = a.statistics;
  const auto put = [&](double statistic) { *out++ = (float)statistic; };
  if (a.policy && a.value) {
    put(total.policy), put(total.value), put(total.kl), put(total.entropy);
  }
  if (a.policy) {
    put(total.clipped / count), put(0.5 * total.squared_log_ratio / count);
    put(total.ratio_mean), put(ratio_max), put(total.ratio_deviation / count);
  }
  if (a.value) put(total.value_clipped / count);
}

void ppo_loss_backward(const PpoLossBackward& a, int threads) {
  const float scale = *a.grad_loss;
  if (scale == 1) return;
  parallel_for(blocks_of(a.elements), kBlock, threads, [&](int64_t block) {
    over_vectors(block * kBlock, smaller((block + 1) * kBlock, a.elements),
                 [&](int64_t i, int lanes) { store(a.grads + i, load(a.grads + i, lanes) * scale, lanes); });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
