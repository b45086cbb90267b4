// PPO's joint loss, its gradients and its statistics in one launch. Without values it is the clipped policy loss, and
// without log-probs the clipped value loss.
//
// A block reads each input of its tile once and writes the gradients; the last block adds the parts of the loss. A
// launch before counts the tokens or sequences, if the divisor of the loss is neither given nor the same for every
// mask, and computes ratios per sequence.
//
//   formula         max(-A r, -A clip(r)) + value_coef (v - R)^2 / 2, clipped, + kl_coef KL - entropy_coef H
//   bytes a token   4 read of each given tensor, 1 of a mask; 4 written of each gradient. Backward: 8 of each gradient
//                   where the gradient of the loss is not 1
//   passes          one; one more before it for ratios per sequence or a count; one in the backward
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

struct alignas(16) Sequence {
  float live;   // number of tokens that count
  float share;  // 1 / live
  float ratio;  // exp of the mean log ratio
};

// The sums over the live tokens of a tile. The terms of the loss are weighted by the shares of the tokens.
enum Sum { kPolicy, kKl, kEntropy, kValue, kClipped, kValueClipped, kSquaredLogRatio, kSums };

struct alignas(16) Part {
  double ratio_mean;
  float ratio_deviation, ratio_max, count, sums[kSums];
};

// The divisor of the loss: `norm` times *items.
struct Divisor {
  double norm;
  const double* items;  // in device memory; nullptr = 1
  bool by_length;       // each token's loss is also divided by the number of live tokens of its sequence
  bool counts_tokens, counts_sequences;  // what *items must count

  explicit Divisor(const PpoLoss& a) {
    const bool by_token = a.divisor.aggregation == Aggregation::token_mean;
    const bool normed = a.divisor.aggregation == Aggregation::seq_mean_token_sum_norm;
    const bool mean = a.divisor.aggregation == Aggregation::seq_mean_token_mean;
    by_length = mean && a.live;
    norm = normed || (mean && !a.live) ? at_least_1((double)a.length) : 1;
    items = a.divisor.items;
    const bool given = items || a.divisor.number >= 0;
    const bool counts = !given && a.live && a.sequences > 0;
    counts_tokens = counts && by_token;
    counts_sequences = counts && !by_token;
    if (!items && a.divisor.number > 0) norm *= a.divisor.number;
    if (!given && !counts) norm *= at_least_1((double)(by_token ? a.sequences * a.length : a.sequences));
  }

  // The weight of a token, 1 / divisor.
  __device__ __forceinline__ float share() const {
    const float count = items ? (float)*items : 1;
    return 1 / ((count > 0 ? count : 1) * (float)norm);
  }
};

// Adds one number of each block, in the last block that calls this. `sum` is written there.
template <class Number>
__device__ __forceinline__ void add_in_last(unsigned* ticket, const Number& number, double* sum) {
  if (!is_last(ticket)) return;
  double total[1] = {0};
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) total[0] += number(i);
  block_sum(total);
  if (threadIdx.x == 0) *sum = total[0];
}

// The number of live tokens.
__global__ void __launch_bounds__(kThreads)
    count_tokens(const uint8_t* live, int64_t count, TileParts<Part> parts, double* items) {
  const ThreadTokens<1> tokens(live, count, {nullptr});
  float sums[1] = {(float)__popc(tokens.live)};
  block_sum(sums);
  if (threadIdx.x == 0) parts.at[blockIdx.x].count = sums[0];
  add_in_last(parts.ticket, [&](int64_t i) { return __ldcg(&parts.at[i].count); }, items);
}

// The numbers of each sequence, one block per sequence; and `items` as the divisor counts them.
__global__ void __launch_bounds__(kThreads)
    measure_sequences(PpoLoss a, Divisor divisor, Sequence* found, unsigned* ticket, double* items) {
  const int64_t start = blockIdx.x * a.length;
  double sums[2] = {0, 0};
  for (int64_t t = threadIdx.x; t < a.length; t += kThreads) {
    const int64_t i = start + t;
    if (a.live && !a.live[i]) continue;
    sums[0]++;
    if (a.sequence_level) sums[1] += bounded_log_ratio(a.logprobs[i] - a.old_logprobs[i]);
  }
  block_sum(sums);
  const double tokens = at_least_1(sums[0]);
  if (threadIdx.x == 0) found[blockIdx.x] = {(float)sums[0], (float)(1 / tokens), expf((float)(sums[1] / tokens))};
  if (!divisor.counts_tokens && !divisor.counts_sequences) return;
  add_in_last(
      ticket,
      [&](int64_t i) {
        const float live = __ldcg(&found[i].live);
        return divisor.counts_tokens ? live : live > 0 ? 1.0f : 0.0f;
      },
      items);
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
__device__ void finish(const PpoLoss& a, const Part* parts) {
  // 1. All sums. Thread i takes the parts i, i + 256, ...; block_sum adds the threads in a fixed order.
  double sums[kSums + 3] = {};  // the last three: the number of live tokens, and sum and sum of squares of their ratios
  double &count = sums[kSums], &ratios = sums[kSums + 1], &squares = sums[kSums + 2];
  float ratio_max = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) {
    const Part part = load_part(parts + i);
#pragma unroll
    for (int k = 0; k < kSums; k++) sums[k] += part.sums[k];
    count += part.count;
    ratios += part.count * part.ratio_mean;
    squares += part.count * part.ratio_mean * part.ratio_mean + part.ratio_deviation;
    ratio_max = larger(part.ratio_max, ratio_max);
  }
  block_sum(sums);
  ratio_max = block_max(ratio_max);
  if (threadIdx.x != 0) return;

  // 2. The loss, and the statistics in the order of PpoLoss in kernels/records.py.
  const double tokens = at_least_1(count);
  const double loss = sums[kPolicy] + term(a.value_terms.coef, sums[kValue]) + term(a.terms.kl_coef, sums[kKl]);
  *a.loss = (float)(loss - term(a.terms.entropy_coef, sums[kEntropy]));
  float* out = a.statistics;
  const auto put = [&](double statistic) { *out++ = (float)statistic; };
  if (kHasPolicy && kHasValue) put(sums[kPolicy]), put(sums[kValue]), put(sums[kKl]), put(sums[kEntropy]);
  if (kHasPolicy) {
    // double is accurate enough for E[x^2] - E[x]^2
    const double ratio_mean = ratios / tokens, variance = squares / tokens - ratio_mean * ratio_mean;
    put(sums[kClipped] / tokens), put(0.5 * sums[kSquaredLogRatio] / tokens);
    // the maximum ignores NaN; the mean does not
    put(ratio_mean), put(ratio_mean == ratio_mean ? ratio_max : ratio_mean), put(variance < 0 ? 0 : variance);
  }
  if (kHasValue) put(sums[kValueClipped] / tokens);
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

  // 2. The weight of each token, and the ratio of its sequence.
  const float share = divisor.share();
  Values4 weight{{share, share, share, share}}, ratio{};
  if (sequences && tokens.left > 0) {
    Sequences of_token(sequences, a.length, tokens.i);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k < tokens.left && divisor.by_length) weight.at[k] *= of_token.at->share;
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
  if (is_last(parts.ticket)) finish<kHasPolicy, kHasValue>(a, parts.at);
}

// Multiplies the gradients by that of the loss, unless it is 1.
__global__ void __launch_bounds__(kThreads) scale_gradients(PpoLossBackward a) {
  const float scale = *a.grad_loss;
  if (scale == 1) return;
  const ThreadTokens<1> tokens(nullptr, a.elements, {a.grads});
  tokens.store(a.grads, [&](int k) { return tokens.of[0].at[k] * scale; });
}

}  // namespace

const char* ppo_loss(const PpoLoss& a, Scratch& scratch, void* stream) {
  const int64_t count = a.sequences * a.length, tiles = tiles_of(count);
  Divisor divisor(a);
  const bool by_sequence = a.sequence_level || divisor.by_length || divisor.counts_sequences;
  const TileParts<Part> parts(scratch, tiles);
  Sequence* sequences = by_sequence ? take<Sequence>(scratch, a.sequences) : nullptr;
  double* items = divisor.counts_tokens || divisor.counts_sequences ? take<double>(scratch, 1) : nullptr;
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = nullptr;
  if (by_sequence) {
    error = launch(measure_sequences, a.sequences, kThreads, 0, stream, a, divisor, sequences, parts.ticket, items);
  } else if (divisor.counts_tokens) {
    error = launch(count_tokens, tiles, kThreads, 0, stream, a.live, count, parts, items);
  }
  if (error) return error;
  if (items) divisor.items = items;
  const auto kernel = !a.value ? evaluate<true, false> : !a.policy ? evaluate<false, true> : evaluate<true, true>;
  return launch(kernel, tiles, kThreads, 0, stream, a, divisor, (const Sequence*)sequences, parts);
}

const char* ppo_loss_backward(const PpoLossBackward& a, Scratch&, void* stream) {
  return launch(scale_gradients, ceil_div(a.elements, kTile), kThreads, 0, stream, a);
}

}  // namespace rlhf_fast::cuda
