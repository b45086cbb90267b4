// PPO's joint loss, its gradients and its statistics in one launch. Without values it is the clipped policy loss, and
// without log-probs the clipped value loss.
//
// A block reads each input of its tile once. It writes the gradients as if the divisor of the loss were 1, because only
// the last block knows how many tokens count. The last block adds the parts of the loss and writes 1 / divisor, by
// which the caller multiplies the gradients. Ratios per sequence, and divisors that count sequences, need a launch
// before.
//
//   formula         max(-A r, -A clip(r)) + value_coef (v - R)^2 / 2, clipped, + kl_coef KL - entropy_coef H
//   bytes a token   4 read of each given tensor, 1 of a mask; 4 written of each gradient
//   passes          one; one more before it for ratios per sequence or a count of sequences
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

struct Sequence {
  double live;  // number of tokens that count
  float ratio;
};

// The sums over the live tokens of a tile. The terms of the loss are weighted as Divisor::by_length says.
enum Sum { kPolicy, kKl, kEntropy, kValue, kClipped, kValueClipped, kSquaredLogRatio, kSums };

struct alignas(16) Part {
  double ratio_mean;
  float ratio_deviation, ratio_max, count, sums[kSums];
};

// The divisor of the loss: `norm` times a number that `items` selects.
struct Divisor {
  enum Items { known, on_device, tokens, sequences } items;
  double norm;
  bool by_length;  // each token's loss is also divided by the number of live tokens of its sequence

  explicit Divisor(const PpoLoss& a) {
    const bool by_token = a.divisor.aggregation == Aggregation::token_mean;
    const bool normed = a.divisor.aggregation == Aggregation::seq_mean_token_sum_norm;
    const bool mean = a.divisor.aggregation == Aggregation::seq_mean_token_mean;
    by_length = mean && a.live;
    norm = normed || (mean && !a.live) ? at_least_1((double)a.length) : 1;
    items = a.divisor.items ? on_device : tokens;
    if (a.divisor.items) return;
    if (a.divisor.number >= 0) {
      items = known;
      norm *= a.divisor.number > 0 ? a.divisor.number : 1;
    } else if (!by_token && !a.live) {
      items = known;
      norm *= at_least_1((double)a.sequences);
    } else if (!by_token) {
      items = sequences;
    }
  }

  bool counts_sequences() const { return by_length || items == sequences; }
};

// The number of live tokens of each sequence, and exp of their mean log ratio; one block per sequence.
__global__ void __launch_bounds__(kThreads) measure_sequences(PpoLoss a, Sequence* found) {
  const int64_t start = blockIdx.x * a.length;
  double sums[2] = {0, 0};
  for (int64_t t = threadIdx.x; t < a.length; t += kThreads) {
    const int64_t i = start + t;
    if (a.live && !a.live[i]) continue;
    sums[0]++;
    if (a.sequence_level) sums[1] += bounded_log_ratio(a.logprobs[i] - a.old_logprobs[i]);
  }
  block_sum(sums);
  if (threadIdx.x == 0) found[blockIdx.x] = {sums[0], expf((float)(sums[1] / at_least_1(sums[0])))};
}

// Iterates over the sequences of a thread's consecutive tokens, with a single division.
struct Sequences {
  const Sequence* at;
  int64_t length, left;

  __device__ __forceinline__ Sequences(const Sequence* all, int64_t length, int64_t token)
      : at(all + token / length), length(length), left(length - token % length) {}

  __device__ __forceinline__ void advance() {
    if (--left == 0) at++, left = length;
  }
};

// A term with coefficient 0 adds 0, even if it is infinite.
__device__ __forceinline__ double term(double coef, double value) { return coef != 0 ? coef * value : 0; }

// Called by the last block: adds the parts, and writes loss and statistics.
template <bool kHasPolicy, bool kHasValue>
__device__ void finish(const PpoLoss& a, const Divisor& divisor, const Sequence* sequences, const Part* parts) {
  // 1. All sums. Thread i takes the parts i, i + 256, ...; block_sum adds the threads in a fixed order.
  double sums[kSums + 2] = {};  // the last two: the number of live tokens, and the sum of their ratios
  double &count = sums[kSums], &ratio_mean = sums[kSums + 1];
  float ratio_max = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) {
    const Part part = load_part(parts + i);
#pragma unroll
    for (int k = 0; k < kSums; k++) sums[k] += part.sums[k];
    count += part.count;
    ratio_mean += part.count * part.ratio_mean;
    ratio_max = larger(part.ratio_max, ratio_max);
  }
  block_sum(sums);
  ratio_max = block_max(ratio_max);
  const double tokens = at_least_1(count);
  ratio_mean /= tokens;

  // 2. Squared deviations from the mean ratio and, in the same reduction, the number of sequences with a live token.
  double rest[2] = {0, 0};
  if (kHasPolicy) {
    for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) {
      const Part part = load_part(parts + i);
      const double step = part.ratio_mean - ratio_mean;
      rest[0] += part.ratio_deviation + part.count * step * step;
    }
  }
  if (divisor.items == Divisor::sequences) {
    for (int64_t i = threadIdx.x; i < a.sequences; i += kThreads) rest[1] += sequences[i].live > 0;
  }
  block_sum(rest);
  if (threadIdx.x != 0) return;

  // 3. The loss, and the statistics in the order of PpoLoss in kernels/records.py.
  double items = 1;
  if (divisor.items == Divisor::on_device) items = *a.divisor.items;
  if (divisor.items == Divisor::tokens) items = count;
  if (divisor.items == Divisor::sequences) items = rest[1];
  const double scale = 1 / ((items > 0 ? items : 1) * divisor.norm);
  const double policy = sums[kPolicy] * scale, value = sums[kValue] * scale;
  const double kl = sums[kKl] * scale, entropy = sums[kEntropy] * scale;
  const double loss = policy + term(a.value_terms.coef, value) + term(a.terms.kl_coef, kl);
  *a.loss = (float)(loss - term(a.terms.entropy_coef, entropy));
  float* out = a.statistics;
  const auto put = [&](double statistic) { *out++ = (float)statistic; };
  if (kHasPolicy && kHasValue) put(policy), put(value), put(kl), put(entropy);
  if (kHasPolicy) {
    put(sums[kClipped] / tokens), put(0.5 * sums[kSquaredLogRatio] / tokens);
    // the maximum ignores NaN; the mean does not
    put(ratio_mean), put(ratio_mean == ratio_mean ? ratio_max : ratio_mean), put(rest[0] / tokens);
  }
  if (kHasValue) put(sums[kValueClipped] / tokens);
  put(scale);
}

template <bool kHasPolicy, bool kHasValue>
__global__ void __launch_bounds__(kThreads)
    evaluate(PpoLoss a, Divisor divisor, const Sequence* sequences, TileParts<Part> parts) {
  constexpr bool kJoint = kHasPolicy && kHasValue;  // the clipped policy loss alone has neither KL nor entropy
  // 1. The tokens. An array that the kernel does not have is absent at compile time.
  const auto policy = [](const float* array) { return kHasPolicy ? array : nullptr; };
  const auto critic = [](const float* array) { return kHasValue ? array : nullptr; };
  const auto joint = [](const float* array) { return kJoint ? array : nullptr; };
  const ThreadTokens tokens(a.live, a.sequences * a.length,
                            {policy(a.logprobs), policy(a.old_logprobs), policy(a.advantages), critic(a.values),
                             critic(a.old_values), critic(a.returns), joint(a.ref_logprobs), joint(a.entropy)});
  const auto& [logprob, old_logprob, advantage, value, old_value, target, ref_logprob, entropy] = tokens.of;
  const unsigned live = tokens.live;

  // 2. The weight and the ratio of each token's sequence.
  Values4 weight{{1, 1, 1, 1}}, ratio{};
  if (sequences && tokens.left > 0) {
    Sequences of_token(sequences, a.length, tokens.i);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k < tokens.left && divisor.by_length) weight.at[k] = (float)(1 / at_least_1(of_token.at->live));
      if (k < tokens.left && a.sequence_level) ratio.at[k] = of_token.at->ratio;
      of_token.advance();
    }
  }

  // 3. The loss of each token. Masked tokens were loaded as 0 and have ratio 0, so they add 0 to every sum.
  float sums[kSums] = {}, ratio_max = 0;
  Values4 grad_logprob, grad_value;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    if (kHasPolicy) {
      const float log_ratio = logprob.at[k] - old_logprob.at[k], bounded = bounded_log_ratio(log_ratio);
      ratio.at[k] = kept(live, k, a.sequence_level ? ratio.at[k] : expf(bounded));
      const LossToken<float> token = policy_token(log_ratio, ratio.at[k], advantage.at[k], a.terms);
      sums[kPolicy] += token.loss * weight.at[k];
      sums[kClipped] += token.clipped;
      sums[kSquaredLogRatio] += bounded * bounded;
      ratio_max = larger(ratio.at[k], ratio_max);
      grad_logprob.at[k] = token.slope;
      if (kJoint && a.ref_logprobs) {
        const float d = logprob.at[k] - ref_logprob.at[k];
        sums[kKl] += kl_value(a.terms.kl, d) * weight.at[k];
        if (a.terms.kl_coef != 0) grad_logprob.at[k] += a.terms.kl_coef * kl_slope(a.terms.kl_slope, d);
      }
    }
    if (kJoint) sums[kEntropy] += entropy.at[k] * weight.at[k];
    if (kHasValue) {
      const LossToken<float> token = value_token(value.at[k], old_value.at[k], target.at[k], a.value_terms);
      sums[kValue] += token.loss * weight.at[k];
      sums[kValueClipped] += token.clipped;
      grad_value.at[k] = a.value_terms.coef * token.slope;
    }
  }
  // 4. The gradients, before the reductions, whose barriers would delay the stores.
  if (kHasPolicy && a.grad_logprobs) {
    tokens.store(a.grad_logprobs, [&](int k) { return grad_logprob.at[k] * weight.at[k]; });
  }
  if (kHasValue && a.grad_values) {
    tokens.store(a.grad_values, [&](int k) { return grad_value.at[k] * weight.at[k]; });
  }
  if (kJoint && a.grad_entropy) {
    tokens.store(a.grad_entropy, [&](int k) { return -a.terms.entropy_coef * weight.at[k]; });
  }

  // 5. The sums of the tile. The last block of the launch adds all of them.
  const Moments ratios = tile_moments(ratio, live);
  block_sum(sums);
  ratio_max = block_max(ratio_max);
  if (threadIdx.x == 0) {
    Part part{ratios.mean, (float)ratios.deviation, ratio_max, (float)ratios.count, {}};
#pragma unroll
    for (int k = 0; k < kSums; k++) part.sums[k] = sums[k];
    parts.at[blockIdx.x] = part;
  }
  if (is_last(parts.ticket)) finish<kHasPolicy, kHasValue>(a, divisor, sequences, parts.at);
}

}  // namespace

const char* ppo_loss(const PpoLoss& a, Scratch& scratch, void* stream) {
  const int64_t tiles = tiles_of(a.sequences * a.length);
  const Divisor divisor(a);
  const bool by_sequence = a.sequence_level || divisor.counts_sequences();
  const size_t parts_bytes = TileParts<Part>::bytes(tiles);
  scratch.needed = parts_bytes + (by_sequence ? a.sequences * sizeof(Sequence) : 0);
  if (scratch.size < scratch.needed) return nullptr;
  const TileParts<Part> parts(scratch.data);
  Sequence* sequences = nullptr;
  if (by_sequence) {
    sequences = (Sequence*)((char*)scratch.data + parts_bytes);
    if (const char* error = launch(measure_sequences, a.sequences, kThreads, 0, stream, a, sequences)) return error;
  }
  if (const char* error = parts.reset(tiles, stream)) return error;
  const auto kernel = !a.value ? evaluate<true, false> : !a.policy ? evaluate<false, true> : evaluate<true, true>;
  return launch(kernel, tiles, kThreads, 0, stream, a, divisor, (const Sequence*)sequences, parts);
}

}  // namespace rlhf_fast::cuda
