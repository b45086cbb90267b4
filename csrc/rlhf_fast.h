// Every launcher of the native engine: raw pointers, int64 sizes and strides (in elements), a dtype and, of the CPU alone,
// a thread count. Nothing here knows torch or Python.
//
// `live` is one byte a token, 0 = does not count and is not read; nullptr = every token counts. Outputs are written
// whole. A launcher's result depends neither on the number of threads nor on where a row stands.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rlhf_fast {

enum class DType : int32_t { f32, bf16, f16 };

// KL estimators, as in rlhf_fast/ops/token_kl.py; a value and its slope may be of different ones ("k3+").
enum class Kl : int32_t { k1, k2, k3, abs };

// As AGGREGATIONS of rlhf_fast/ops/_aggregate.py, in that order.
enum class Aggregation : int32_t { token_mean, seq_mean_token_sum, seq_mean_token_mean, seq_mean_token_sum_norm };

// ---- vocabulary level: one row is one token -------------------------------------------------------------------------

// Rows of logits; the column stride is 1.
struct Logits {
  void* data;
  DType dtype;
  int64_t row_stride;
};

struct Rows {
  int64_t count;
  int64_t vocab;            // columns in the softmax
  const int64_t* targets;   // (count,); in [0, vocab) where live
  const uint8_t* live;      // (count,) or nullptr
  const float* temperature; // (count,)
  int64_t temperature_stride;  // 0 where all rows share one
  float softcap;            // 0 = none
  int threads;
};

// What the backward of a row needs; statistics of a row are kStatistics floats, in this order.
constexpr int kStatistics = 4;
struct RowStatistics {
  float shift;        // the largest other logit, after the softcap, before the temperature
  float others_mass;  // 1 - p_target
  float scale;        // p_j = e^((x_j - shift) / temperature) * scale
  float log_norm;     // log p_j = (x_j - shift) / temperature - log_norm
};

struct MaskedLogprobs {
  Rows rows;
  Logits logits;
  float* logprobs;
  float* entropy;     // nullptr = not wanted
  float* statistics;  // (count, kStatistics)
};

struct MaskedLogprobsBackward {
  Rows rows;
  Logits logits;
  int64_t columns;             // of grad; those past vocab get 0
  const float* statistics;
  const float* logprobs;
  const float* entropy;        // needed with grad_entropy
  const float* grad_logprobs;  // (count,), or nullptr = 0
  const float* grad_entropy;   // (count,), or nullptr = 0
  Logits grad;                 // may be the logits themselves
};

struct ExactKl {
  Rows rows;  // no targets, no softcap
  Logits logits;
  Logits ref_logits;
  float* kl;
  float* statistics;  // (count, 4) for the backward
};

struct ExactKlBackward {
  Rows rows;
  Logits logits;
  Logits ref_logits;
  const float* statistics;
  const float* kl;
  const float* grad_kl;  // (count,)
  Logits grad;           // may be the logits themselves
};

// ---- the fold of the ops with an lm head: a tile of logits and its gradient -------------------------------------------
//
// The logits are float32. The gradient `grad` (data nullptr = not wanted) may lie over them, each row where its logits
// start; on CUDA a narrower one may not.

// logprobs and entropy of every row, and grad_logprobs * d logprob + grad_entropy * d entropy.
struct LinearLogprobs {
  Rows rows;
  float* logits;
  int64_t row_stride;
  float* logprobs;
  float* entropy;              // nullptr = not wanted
  Logits grad;
  const float* grad_logprobs;  // (count,), or nullptr = 1
  const float* grad_entropy;   // (count,), or nullptr = 0
};

// The same with the gradient of share * (policy loss + kl_coef * KL - entropy_coef * entropy) at ratios by the token.
struct LinearPolicyLoss {
  Rows rows;
  float* logits;
  int64_t row_stride;
  const float* old_logprobs;
  const float* advantages;
  const float* ref_logprobs;  // nullptr = no KL
  const float* share;         // (count,) of the token in the loss
  float clip_low, clip_high, dual_clip;  // bounds of the ratio: 1 - clip_low, 1 + clip_high; +inf = no dual clip
  float kl_coef, entropy_coef;
  Kl kl_slope;
  Logits grad;
  float* logprobs;
  float* entropy;
};

// Policy and reference side by side: a tile of logits each; the gradient is that of the policy's,
// grad_logprobs * d logprob + grad_entropy * d entropy + grad_kl * d KL.
struct LinearPolicyRef {
  Rows rows;
  float* logits;
  int64_t row_stride;
  float* ref_logits;
  int64_t ref_row_stride;
  float* logprobs;
  float* ref_logprobs;
  float* entropy;
  float* kl;
  Logits grad;
  const float* grad_logprobs;  // these three, (count,), with grad
  const float* grad_entropy;
  const float* grad_kl;
};

// ---- token level ----------------------------------------------------------------------------------------------------

struct TokenKl {
  int64_t count;
  const float* logprobs;
  const float* ref_logprobs;
  const uint8_t* live;
  Kl estimator;
  float* kl;
  int threads;
};

struct TokenKlBackward {
  int64_t count;
  const float* logprobs;
  const float* ref_logprobs;
  const uint8_t* live;
  Kl slope;
  const float* grad_kl;
  float* grad;
  int threads;
};

struct Gae {
  int64_t sequences;
  int64_t length;             // of a padded row; of all sequences together where cu_seqlens is given
  const int64_t* cu_seqlens;  // (sequences + 1,) bounds of packed sequences, or nullptr = padded
  const float* rewards;
  const float* values;
  const uint8_t* live;
  double gamma, lam;
  bool whiten;                // advantages alone
  float* advantages;
  float* returns;
  int threads;
};

// Count and sum of the live elements or, with a mean, count and sum of squared deviations from it.
struct MaskedMoments {
  int64_t count;
  const float* x;
  const uint8_t* live;
  const double* mean;  // or nullptr
  double* moments;     // 2
  int threads;
};

// (x - mean) * scale, + mean where not shift_mean. With statistics given they are used, else they are computed.
struct MaskedWhiten {
  int64_t count;
  const float* x;
  const uint8_t* live;
  bool shift_mean;
  bool unbiased;
  bool given;          // statistics are an input
  double* statistics;  // 3: live elements, mean, scale = 1 / sqrt(variance + 1e-8)
  float* whitened;
  int threads;
};

struct MaskedWhitenBackward {
  int64_t count;
  const float* x;
  const uint8_t* live;
  bool shift_mean;
  bool unbiased;
  const double* statistics;
  const float* grad_whitened;
  float* grad;
  int threads;
};

// PPO's joint loss: policy + value_coef * value + kl_coef * KL - entropy_coef * entropy; or the policy's or the value's
// alone. The statistics are, of what is there,
// - of the joint loss its terms: policy, value, KL, entropy;
// - of the policy: clip_fraction, approx_kl, ratio_mean, ratio_max, ratio_var;
// - of the value: clip_fraction;
// - always: what the gradients are still to be multiplied by.
struct PpoLoss {
  bool policy, value;  // what is there; the other's data is not read
  int64_t sequences, length;
  const float* logprobs;
  const float* old_logprobs;
  const float* advantages;
  const float* values;
  const float* old_values;
  const float* returns;
  const float* entropy;       // or nullptr
  const float* ref_logprobs;  // or nullptr
  const uint8_t* live;
  float clip_low, clip_high, dual_clip;  // +inf = no dual clip
  float value_clip;                      // +inf = no clip
  float value_coef, entropy_coef, kl_coef;
  Kl kl, kl_slope;
  Aggregation aggregation;
  double num_items;     // < 0 = count here
  const double* items;  // or it is there, on the device: CUDA alone
  float* loss;       // 1
  float* statistics;
  float* grad_logprobs;  // these three of the loss, (sequences, length); nullptr = not wanted
  float* grad_values;
  float* grad_entropy;
  int threads;
  bool sequence_level;
};

// ---- the launchers: the CPU's, compiled once for each instruction set, and CUDA's ------------------------------------

#define RLHF_FAST_LAUNCHERS(X)                         \
  X(masked_logprobs, MaskedLogprobs)                   \
  X(masked_logprobs_backward, MaskedLogprobsBackward)  \
  X(exact_kl, ExactKl)                                 \
  X(exact_kl_backward, ExactKlBackward)                \
  X(linear_logprobs, LinearLogprobs)                   \
  X(linear_policy_loss, LinearPolicyLoss)              \
  X(linear_policy_ref, LinearPolicyRef)                \
  X(token_kl, TokenKl)                                 \
  X(token_kl_backward, TokenKlBackward)                \
  X(gae, Gae)                                          \
  X(masked_moments, MaskedMoments)                     \
  X(masked_whiten, MaskedWhiten)                       \
  X(masked_whiten_backward, MaskedWhitenBackward)      \
  X(ppo_loss, PpoLoss)

struct CpuLaunchers {
  const char* path;  // "avx512", "avx2" or "portable"
#define RLHF_FAST_MEMBER(name, Arguments) void (*name)(const Arguments&);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_MEMBER)
#undef RLHF_FAST_MEMBER
};

#define RLHF_FAST_DECLARE(name, Arguments) void name(const Arguments&);
#define RLHF_FAST_DECLARE_PATH(path_name)           \
  namespace path_name {                             \
  extern const CpuLaunchers launchers;              \
  RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)        \
  }
RLHF_FAST_DECLARE_PATH(avx512)
RLHF_FAST_DECLARE_PATH(avx2)
RLHF_FAST_DECLARE_PATH(portable)
#undef RLHF_FAST_DECLARE_PATH
#undef RLHF_FAST_DECLARE

// The paths that this build holds and this processor can run, best first; a nullptr ends the list.
const CpuLaunchers* const* cpu_paths();
// The chosen one, the best unless `choose_cpu_path` named another. False where that one cannot run here.
const CpuLaunchers& cpu();
bool choose_cpu_path(const char* path);

// out (rows, columns) = left (rows, inner) right (columns, inner)^T, from bfloat16 to float32. The inner stride is 1.
struct BFloat16Product {
  int64_t rows, columns, inner;
  const uint16_t* left;
  int64_t left_stride;
  const uint16_t* right;
  int64_t right_stride;
  float* out;
  int64_t out_stride;
  int threads;
};
// Whether the chosen path has the instructions for it; without, bfloat16_product must not be called.
bool multiplies_bfloat16();
// False when memory for its packed columns could not be had.
bool bfloat16_product(const BFloat16Product&);

// ---- CUDA: the same arguments, and a stream ---------------------------------------------------------------------------

// Memory of the device for what a launch finds on its way. A launcher first sets `needed`; where `size` is less it
// returns without a launch.
struct Scratch {
  void* data;
  size_t size;
  size_t needed;
};

namespace cuda {
// nullptr or the text of CUDA's error. Nothing waits for the device.
#define RLHF_FAST_DECLARE(name, Arguments) const char* name(const Arguments&, Scratch&, void* stream);
RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

// Why the kernels cannot run on the current device: CUDA's text, or nullptr.
const char* cannot_run();
}  // namespace cuda

}  // namespace rlhf_fast
