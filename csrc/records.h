// The launchers' arguments. Written by csrc/write_records.py from kernels/records.py: change that file.
// `fields(a)` ties a structure's fields in their order; `last` is the last code of an enum.
#pragma once

#include <cstdint>
#include <tuple>

#define RLHF_FAST_RECORDS "3444c1ac2e257c4e"

namespace rlhf_fast {

enum class DType : int32_t { f32, bf16, f16 };
constexpr int32_t last(DType) { return 2; }
enum class Kl : int32_t { k1, k2, k3, abs };
constexpr int32_t last(Kl) { return 3; }
enum class Activation : int32_t { silu, gelu_tanh, gelu, relu };
constexpr int32_t last(Activation) { return 3; }
enum class Aggregation : int32_t { token_mean, seq_mean_token_sum, seq_mean_token_mean, seq_mean_token_sum_norm };
constexpr int32_t last(Aggregation) { return 3; }

constexpr int kStatistics = 4;
constexpr int kExtras = 3;

struct Rows {
  int64_t length;              // rows
  int64_t vocab;               // columns in the softmax
  const int64_t* targets;      // (length,); in [0, vocab) where live
  const uint8_t* live;         // (length,)
  int64_t ignore_index;        // a row with this target does not count either
  const float* temperatures;   // (length,); None = all rows have ``temperature``
  int64_t temperature_stride;  // stride of temperatures
  float temperature;
  float softcap;  // 0 = none
};
inline auto fields(Rows& a) {
  return std::tie(a.length, a.vocab, a.targets, a.live, a.ignore_index, a.temperatures, a.temperature_stride,
                  a.temperature, a.softcap);
}

struct Logits {
  void* data;  // None = not wanted
  DType dtype;
  int64_t row_stride;
  int64_t batch_rows;
  int64_t batch_stride;
};
inline auto fields(Logits& a) { return std::tie(a.data, a.dtype, a.row_stride, a.batch_rows, a.batch_stride); }

struct RowOutputs {
  float* logprobs;
  float* entropy;    // None = not wanted
  float* logsumexp;  // None = neither this nor extras is wanted; with it, entropy is wanted too
  float* extras;     // (length, EXTRAS)
};
inline auto fields(RowOutputs& a) { return std::tie(a.logprobs, a.entropy, a.logsumexp, a.extras); }

struct MaskedLogprobs {
  Rows rows;
  Logits logits;
  RowOutputs outputs;
  float* statistics;  // (length, STATISTICS)
};
inline auto fields(MaskedLogprobs& a) { return std::tie(a.rows, a.logits, a.outputs, a.statistics); }

struct MaskedLogprobsBackward {
  Rows rows;
  Logits logits;
  int64_t columns;  // columns of grad; columns past vocab get 0
  const float* statistics;
  const float* logprobs;
  const float* entropy;         // needed with grad_entropy
  const float* grad_logprobs;   // (length,), or None = 0
  const float* grad_entropy;    // (length,), or None = 0
  const float* grad_logsumexp;  // (length,), or None = 0
  Logits grad;                  // may be the logits themselves
};
inline auto fields(MaskedLogprobsBackward& a) {
  return std::tie(a.rows, a.logits, a.columns, a.statistics, a.logprobs, a.entropy, a.grad_logprobs, a.grad_entropy,
                  a.grad_logsumexp, a.grad);
}

struct ExactKl {
  Rows rows;  // no targets, no softcap
  Logits logits;
  Logits ref_logits;
  float* kl;
  float* statistics;  // (length, STATISTICS)
};
inline auto fields(ExactKl& a) { return std::tie(a.rows, a.logits, a.ref_logits, a.kl, a.statistics); }

struct ExactKlBackward {
  Rows rows;
  Logits logits;
  Logits ref_logits;
  const float* statistics;
  const float* kl;
  const float* grad_kl;  // (length,)
  Logits grad;           // may be the logits themselves
};
inline auto fields(ExactKlBackward& a) {
  return std::tie(a.rows, a.logits, a.ref_logits, a.statistics, a.kl, a.grad_kl, a.grad);
}

struct LinearLogprobs {
  Rows rows;
  Logits logits;
  RowOutputs outputs;
  Logits grad;
  const float* grad_logprobs;   // (length,), or None = 1
  const float* grad_entropy;    // (length,), or None = 0
  const float* grad_logsumexp;  // (length,), or None = 0
};
inline auto fields(LinearLogprobs& a) {
  return std::tie(a.rows, a.logits, a.outputs, a.grad, a.grad_logprobs, a.grad_entropy, a.grad_logsumexp);
}

struct PolicyTerms {
  float clip_low;  // the ratio is clipped to [1 - clip_low, 1 + clip_high]
  float clip_high;
  float dual_clip;  // +inf = none
  float kl_coef;
  float entropy_coef;
  Kl kl;        // the formula of the KL's value
  Kl kl_slope;  // and of its slope ("k3+" has k2's)
};
inline auto fields(PolicyTerms& a) {
  return std::tie(a.clip_low, a.clip_high, a.dual_clip, a.kl_coef, a.entropy_coef, a.kl, a.kl_slope);
}

struct LinearPolicyLoss {
  Rows rows;
  Logits logits;
  Logits ref_logits;
  const float* old_logprobs;
  const float* advantages;
  const float* ref_logprobs;  // needed for an estimate with kl_coef
  const float* share;         // (length,) the weight of the token in the loss
  PolicyTerms terms;
  Logits grad;
  float* logprobs;
  float* entropy;
  float* kl;  // the exact KL; needed with ref_logits
};
inline auto fields(LinearPolicyLoss& a) {
  return std::tie(a.rows, a.logits, a.ref_logits, a.old_logprobs, a.advantages, a.ref_logprobs, a.share, a.terms,
                  a.grad, a.logprobs, a.entropy, a.kl);
}

struct LinearPolicyRef {
  Rows rows;
  Logits logits;
  Logits ref_logits;
  float* logprobs;
  float* ref_logprobs;
  float* entropy;
  float* kl;
  Logits grad;
  const float* grad_logprobs;  // this, grad_entropy and grad_kl: (length,), needed with grad
  const float* grad_entropy;
  const float* grad_kl;
};
inline auto fields(LinearPolicyRef& a) {
  return std::tie(a.rows, a.logits, a.ref_logits, a.logprobs, a.ref_logprobs, a.entropy, a.kl, a.grad, a.grad_logprobs,
                  a.grad_entropy, a.grad_kl);
}

struct TokenKl {
  int64_t tokens;
  const float* logprobs;
  const float* ref_logprobs;
  const uint8_t* live;
  Kl estimator;
  float* kl;
};
inline auto fields(TokenKl& a) { return std::tie(a.tokens, a.logprobs, a.ref_logprobs, a.live, a.estimator, a.kl); }

struct TokenKlBackward {
  int64_t tokens;
  const float* logprobs;
  const float* ref_logprobs;
  const uint8_t* live;
  Kl slope;
  const float* grad_kl;
  float* grad;
};
inline auto fields(TokenKlBackward& a) {
  return std::tie(a.tokens, a.logprobs, a.ref_logprobs, a.live, a.slope, a.grad_kl, a.grad);
}

struct Gae {
  int64_t sequences;
  int64_t length;             // tokens of a padded row; with cu_seqlens, tokens of all sequences together
  const int64_t* cu_seqlens;  // (sequences + 1,) bounds of packed sequences, or None = padded
  const float* rewards;
  const float* values;
  const uint8_t* live;
  double gamma;
  double lam;
  bool whiten;  // whitens the advantages, not the returns
  float* advantages;
  float* returns;
};
inline auto fields(Gae& a) {
  return std::tie(a.sequences, a.length, a.cu_seqlens, a.rewards, a.values, a.live, a.gamma, a.lam, a.whiten,
                  a.advantages, a.returns);
}

struct MaskedMoments {
  int64_t elements;
  const float* x;
  const uint8_t* live;
  const double* mean;
  double* moments;  // 2
};
inline auto fields(MaskedMoments& a) { return std::tie(a.elements, a.x, a.live, a.mean, a.moments); }

struct MaskedWhiten {
  int64_t elements;
  const float* x;
  const uint8_t* live;
  bool shift_mean;
  bool unbiased;
  bool given;          // statistics are an input
  double* statistics;  // 3: live elements, mean, scale = 1 / sqrt(variance + 1e-8)
  float* whitened;
};
inline auto fields(MaskedWhiten& a) {
  return std::tie(a.elements, a.x, a.live, a.shift_mean, a.unbiased, a.given, a.statistics, a.whitened);
}

struct MaskedWhitenBackward {
  int64_t elements;
  const float* x;
  const uint8_t* live;
  bool shift_mean;
  bool unbiased;
  const double* statistics;
  const float* grad_whitened;
  float* grad;
};
inline auto fields(MaskedWhitenBackward& a) {
  return std::tie(a.elements, a.x, a.live, a.shift_mean, a.unbiased, a.statistics, a.grad_whitened, a.grad);
}

struct ValueTerms {
  float clip;  // +inf = none
  float coef;
};
inline auto fields(ValueTerms& a) { return std::tie(a.clip, a.coef); }

struct LossDivisor {
  Aggregation aggregation;
  double number;        // num_items; below 0 = the launcher counts
  const double* items;  // num_items on the device, used instead of number; only on CUDA
};
inline auto fields(LossDivisor& a) { return std::tie(a.aggregation, a.number, a.items); }

struct PpoLoss {
  bool policy;  // whether the loss has a policy term; if not, its data is not read
  bool value;   // the same for the value term
  int64_t sequences;
  int64_t length;
  const float* logprobs;
  const float* old_logprobs;
  const float* advantages;
  const float* values;
  const float* old_values;
  const float* returns;
  const float* entropy;
  const float* ref_logprobs;
  const uint8_t* live;
  bool sequence_level;  // ratios per sequence
  PolicyTerms terms;
  ValueTerms value_terms;
  LossDivisor divisor;
  float* loss;  // 1
  float* statistics;
  float* grad_logprobs;  // the three gradients of the loss: (sequences, length); None = not wanted
  float* grad_values;
  float* grad_entropy;
};
inline auto fields(PpoLoss& a) {
  return std::tie(a.policy, a.value, a.sequences, a.length, a.logprobs, a.old_logprobs, a.advantages, a.values,
                  a.old_values, a.returns, a.entropy, a.ref_logprobs, a.live, a.sequence_level, a.terms, a.value_terms,
                  a.divisor, a.loss, a.statistics, a.grad_logprobs, a.grad_values, a.grad_entropy);
}

struct PpoLossBackward {
  int64_t elements;
  const float* grad_loss;  // 1
  float* grads;
};
inline auto fields(PpoLossBackward& a) { return std::tie(a.elements, a.grad_loss, a.grads); }

struct Hidden {
  void* data;  // None = not wanted
  int64_t row_stride;
};
inline auto fields(Hidden& a) { return std::tie(a.data, a.row_stride); }

struct RmsNorm {
  int64_t tokens;
  int64_t width;
  DType dtype;
  Hidden hidden;
  const float* weight;  // (width,); None = 1
  float eps;
  Hidden normed;
  float* scale;  // (tokens,) 1 / sqrt(mean(x^2) + eps)
};
inline auto fields(RmsNorm& a) {
  return std::tie(a.tokens, a.width, a.dtype, a.hidden, a.weight, a.eps, a.normed, a.scale);
}

struct RmsNormBackward {
  int64_t tokens;
  int64_t width;
  DType dtype;
  Hidden hidden;
  const float* weight;
  const float* scale;
  Hidden grad_normed;
  Hidden grad_hidden;
  float* grad_weight;  // (width,); None = not wanted
};
inline auto fields(RmsNormBackward& a) {
  return std::tie(a.tokens, a.width, a.dtype, a.hidden, a.weight, a.scale, a.grad_normed, a.grad_hidden, a.grad_weight);
}

struct GatedActivation {
  int64_t tokens;
  int64_t width;
  DType dtype;
  Activation activation;
  Hidden gate;
  Hidden up;
  Hidden product;
};
inline auto fields(GatedActivation& a) {
  return std::tie(a.tokens, a.width, a.dtype, a.activation, a.gate, a.up, a.product);
}

struct GatedActivationBackward {
  int64_t tokens;
  int64_t width;
  DType dtype;
  Activation activation;
  Hidden gate;
  Hidden up;
  Hidden grad_product;
  Hidden grad_gate;
  Hidden grad_up;
};
inline auto fields(GatedActivationBackward& a) {
  return std::tie(a.tokens, a.width, a.dtype, a.activation, a.gate, a.up, a.grad_product, a.grad_gate, a.grad_up);
}

struct Heads {
  void* data;
  int64_t sequence_stride;
  int64_t head_stride;
  int64_t token_stride;
};
inline auto fields(Heads& a) { return std::tie(a.data, a.sequence_stride, a.head_stride, a.token_stride); }

struct Angles {
  void* cos;
  void* sin;
  DType dtype;              // float32, or the dtype of the heads
  int64_t sequence_stride;  // 0 = all sequences have the same
  int64_t token_stride;
};
inline auto fields(Angles& a) { return std::tie(a.cos, a.sin, a.dtype, a.sequence_stride, a.token_stride); }

struct RotaryEmbedding {
  int64_t sequences;
  int64_t heads;
  int64_t length;
  int64_t width;   // columns of a head
  int64_t turned;  // columns that are rotated; even, at most width
  DType dtype;
  Heads x;
  Angles angles;
  bool backward;  // the transposed rotation: x is the gradient of the result, out that of the input
  Heads out;
};
inline auto fields(RotaryEmbedding& a) {
  return std::tie(a.sequences, a.heads, a.length, a.width, a.turned, a.dtype, a.x, a.angles, a.backward, a.out);
}

}  // namespace rlhf_fast

// Name and arguments of every launcher, for the CPU and for CUDA.
#define RLHF_FAST_LAUNCHERS(X)                          \
  X(masked_logprobs, MaskedLogprobs)                    \
  X(masked_logprobs_backward, MaskedLogprobsBackward)   \
  X(exact_kl, ExactKl)                                  \
  X(exact_kl_backward, ExactKlBackward)                 \
  X(linear_logprobs, LinearLogprobs)                    \
  X(linear_policy_loss, LinearPolicyLoss)               \
  X(linear_policy_ref, LinearPolicyRef)                 \
  X(token_kl, TokenKl)                                  \
  X(token_kl_backward, TokenKlBackward)                 \
  X(gae, Gae)                                           \
  X(masked_moments, MaskedMoments)                      \
  X(masked_whiten, MaskedWhiten)                        \
  X(masked_whiten_backward, MaskedWhitenBackward)       \
  X(ppo_loss, PpoLoss)                                  \
  X(ppo_loss_backward, PpoLossBackward)                 \
  X(rms_norm, RmsNorm)                                  \
  X(rms_norm_backward, RmsNormBackward)                 \
  X(gated_activation, GatedActivation)                  \
  X(gated_activation_backward, GatedActivationBackward) \
  X(rotary_embedding, RotaryEmbedding)
