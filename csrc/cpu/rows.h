// One row of logits: its log-sum-exp in one pass (online softmax), its gradient in another. The formulas are those of
// rlhf_fast/ops/_vocab.py. They keep the target separate from the other columns, so that no step subtracts nearly equal
// numbers.
//
// A row is read in blocks. Exponentials are relative to the running max. Sums are float within a block and double over
// blocks, so that a row of 151936 columns is as accurate as a short one.
#pragma once

#include <cmath>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

// Columns of a block: 8 KB of floats, which stay in L1 between the loop for the maximum and the loop for the sums.
constexpr int kRowBlock = 2048;
// Bound of a log-ratio that is multiplied by a probability. Where the probability is 0, the product is 0, not 0 * inf.
constexpr double kFar = 1e4;

// min(x, bound), but NaN where x is NaN.
RLHF_FAST_INLINE double at_most(double x, double bound) { return x > bound ? bound : x; }

// A row of logits as floats, after the softcap. The target's column reads as -inf (target -1 = none), and so do the
// lanes of the last vector past the row's end.
template <class T>
class Row {
 public:
  Row(const T* data, int64_t vocab, int64_t target, float softcap)
      : data_(data), vocab_(vocab), target_(target), softcap_(softcap) {}

  int64_t vocab() const { return vocab_; }
  float softcap() const { return softcap_; }

  float target_logit() const {
    if (target_ < 0 || target_ >= vocab_) return __builtin_nanf("");
    return capped(load(data_ + target_, 1))[0];
  }

  // Calls `visit` with the block at `start`, a multiple of whole vectors. Most blocks are read in place. A block with
  // the target, a softcap or an incomplete last vector is first copied to `scratch` as floats, so that the loops over
  // the columns need no special case.
  template <class Visit>
  RLHF_FAST_INLINE void visit_block(int64_t start, int count, float* scratch, const Visit& visit) const {
    const bool holds_target = target_ >= start && target_ < start + count;
    if (softcap_ == 0 && !holds_target && count % kLanes == 0) return visit(data_ + start);
    visit((const float*)copy_block(start, count, scratch));
  }

  const float* copy_block(int64_t start, int count, float* scratch) const {
    for (int i = 0; i < count; i += kLanes) {
      F32 x = capped(load(data_ + start + i, count - i));
      if (count - i < kLanes) x = where(first_lanes(count - i), x, all(-__builtin_inff()));
      store(scratch + i, x);
    }
    if (target_ >= start && target_ < start + count) scratch[target_ - start] = -__builtin_inff();
    return scratch;
  }

 private:
  RLHF_FAST_INLINE F32 capped(F32 x) const { return softcap_ == 0 ? x : softcap_ * tanh(x / softcap_); }

  const T* data_;
  int64_t vocab_, target_;
  float softcap_;
};

template <class Visit>
RLHF_FAST_INLINE void over_blocks(int64_t vocab, const Visit& visit) {
  for (int64_t start = 0; start < vocab; start += kRowBlock) {
    visit(start, (int)(vocab - start < kRowBlock ? vocab - start : kRowBlock));
  }
}

// Sums over all columns except the target, with gap = (x - shift) / temperature. tops + rest is the usual sum of the
// softmax. Columns at the maximum, with e^gap = 1, are counted separately, because 1 + 1e-8 is 1 in float: a row with
// one large logit would lose the sum of all others.
struct RowSums {
  float shift = -__builtin_inff();  // the maximum of x
  int64_t tops = 0;                 // number of columns with x = shift
  double rest = 0;                  // sum of e^gap over the columns with x < shift
  double weighted = 0;              // sum of e^gap * -gap, for the entropy
  // For the extras:
  double squares = 0;  // sum of e^(2 gap) over the columns with x < shift
  double logits = 0;   // sum of x over the columns with x > -inf
  int64_t finite = 0;  // number of these columns, those with NaN or +inf included

  double total() const { return tops + rest; }
  double log_total() const { return tops > 0 ? std::log1p(tops - 1 + rest) : std::log(rest); }

  // Makes the sums relative to a larger maximum: the rescaling step of the online softmax. The former maximum is below
  // the new shift, so `tops` joins `rest`. Every -gap grows by `rise`.
  void raise_shift(float peak, float inverse_temperature) {
    if (!(peak > shift)) return;
    if (shift > -__builtin_inff()) {
      const double rise = ((double)peak - shift) * inverse_temperature;
      const double shrink = std::exp(-rise);
      weighted = shrink * (weighted + rise * total());
      squares = shrink * shrink * (tops + squares);
      rest = shrink * total();
      tops = 0;
    }
    shift = peak;
  }
};

// Which of RowSums are wanted: those of the log-prob; `weighted` too, for the entropy; all of them.
enum Wanted { kLogprob, kEntropy, kAll };

// Adds a block. kTop: the block contains the running max. In other blocks no column has gap 0, so their loop needs no
// comparison.
template <Wanted kWanted, bool kTop, class T>
RLHF_FAST_INLINE void add_block(const T* x, int count, float inverse_temperature, RowSums& sums) {
  const float rate = kLog2E * inverse_temperature;
  const F32 shift = all(sums.shift == -__builtin_inff() ? 0.0f : sums.shift);
  // `gap` is not divided by the temperature: exp2_scaled multiplies by `rate`, and the weighted sum is scaled once.
  F32 rest{}, weighted{}, tops{}, squares{}, logits{}, finite{};
  for (int i = 0; i < count; i += kLanes) {
    const F32 logit = load(x + i), gap = logit - shift;
    const F32 e = exp2_scaled(gap, rate);
    const F32 below = kTop ? where(gap == 0.0f, F32{}, e) : e;
    rest += below;
    if (kTop) tops += where(gap == 0.0f, e, F32{});
    if (kWanted >= kEntropy) weighted -= where(e == 0.0f, F32{}, e * gap);  // 0 * -inf would be NaN
    if (kWanted == kAll) {
      squares += below * e;
      const auto absent = logit == -__builtin_inff();
      logits += where(absent, F32{}, logit);
      finite += where(absent, F32{}, all(1.0f));
    }
  }
  sums.rest += sum(rest);
  if (kTop) sums.tops += (int64_t)sum(tops);
  if (kWanted >= kEntropy) sums.weighted += (double)sum(weighted) * inverse_temperature;
  if (kWanted == kAll) sums.squares += sum(squares), sums.logits += sum(logits), sums.finite += (int64_t)sum(finite);
}

template <Wanted kWanted, class T>
RLHF_FAST_INLINE RowSums sum_row(const Row<T>& row, float inverse_temperature) {
  RowSums sums;
  alignas(64) float scratch[kRowBlock];
  over_blocks(row.vocab(), [&](int64_t start, int count) __attribute__((always_inline)) {
    row.visit_block(start, count, scratch, [&](const auto* x) __attribute__((always_inline)) {
      // 1. The maximum of the block, in four independent chains: a single chain is bound by the latency of maxps.
      F32 peaks[4];
      for (int k = 0; k < 4; k++) peaks[k] = all(-__builtin_inff());
      int i = 0;
      for (; i + 3 * kLanes < count; i += 4 * kLanes) {
        for (int k = 0; k < 4; k++) peaks[k] = larger(load(x + i + k * kLanes), peaks[k]);
      }
      for (; i < count; i += kLanes) peaks[0] = larger(load(x + i), peaks[0]);
      const float peak = largest(larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3])));
      // 2. The sums relative to the running max, so that no exponential exceeds 1 or overflows.
      sums.raise_shift(peak, inverse_temperature);
      if (peak == sums.shift) {
        add_block<kWanted, true>(x, count, inverse_temperature, sums);
      } else {
        add_block<kWanted, false>(x, count, inverse_temperature, sums);
      }
    });
  });
  return sums;
}

struct RowResult {
  RowStatistics statistics;
  double log_norm;  // statistics.log_norm before rounding to float, and not bounded by kFar
  float logprob;
  float entropy;                                 // with kEntropy and kAll
  float logsumexp, mean_logit, log_sum_squares;  // with kAll, as the next
  bool is_top1;
};

// With d the log odds against the target (log-sum-exp of the other columns minus the target's logit),
// log p_target = -softplus(d) and 1 - p_target = sigmoid(d).
RLHF_FAST_INLINE RowResult finish_row(const RowSums& sums, float target_logit, float inverse_temperature) {
  // 1. The log-sum-exp of the other columns, relative to the shift; 0 if all of them are -inf.
  const bool alone = sums.shift == -__builtin_inff();
  const bool empty = alone && sums.rest == 0;
  const double total = empty ? 1 : sums.total(), log_total = empty ? 0 : sums.log_total();
  // 2. The log odds. A target at +inf gives NaN, as in the torch reference.
  double d = ((double)sums.shift - target_logit) * inverse_temperature + log_total;
  if (target_logit == __builtin_inff()) d = __builtin_nan("");
  // 3. Probabilities and softplus from e^-|d| <= 1, which cannot overflow.
  const double certainty = std::fabs(d), odds = std::exp(-certainty), softplus = std::log1p(odds);
  const double larger_mass = 1 / (1 + odds), smaller_mass = odds * larger_mass;  // of p_target and 1 - p_target
  const double others_mass = d > 0 ? larger_mass : smaller_mass;
  // 4. entropy = H(p_target, 1 - p_target) + others_mass * H(softmax over the other columns)
  const double binary_entropy = smaller_mass * at_most(certainty, kFar) + softplus;
  const double others_entropy = log_total + sums.weighted / total;
  RowResult result;
  result.statistics.shift = alone ? 0 : sums.shift;
  result.statistics.others_mass = (float)others_mass;
  result.statistics.scale = (float)(others_mass / total);
  result.log_norm = log_total + (d < 0 ? -d : 0) + softplus;
  result.statistics.log_norm = (float)at_most(result.log_norm, kFar);
  result.logprob = (float)-((d > 0 ? d : 0) + softplus);
  result.entropy = (float)(binary_entropy + others_mass * others_entropy);
  return result;
}

// The rest of the outputs. A row that is NaN is NaN in all of them.
RLHF_FAST_INLINE void finish_extras(const RowSums& sums, int64_t vocab, float target_logit, float inverse_temperature,
                                    RowResult& result) {
  const double infinity = __builtin_inf(), logprob = result.logprob;
  // sum of p_j^2 over the other columns, relative to the target's and to the largest other's
  const double target_part = 2 * logprob, others_part = std::log(sums.tops + sums.squares) - 2 * result.log_norm;
  const double larger_part = std::fmax(target_part, others_part), gap = std::fabs(target_part - others_part);
  result.log_sum_squares = (float)(larger_part + std::log1p(std::exp(-gap)));
  const bool others_lead = sums.shift > target_logit;
  result.logsumexp = (float)(others_lead ? (double)sums.shift * inverse_temperature + result.log_norm
                                         : (double)target_logit * inverse_temperature - logprob);
  const bool whole = sums.finite == vocab - 1;
  result.mean_logit = (float)(whole ? (sums.logits + target_logit) * inverse_temperature / vocab : -infinity);
  result.is_top1 = target_logit >= sums.shift;
  if (std::isnan(result.logprob)) {
    result.logsumexp = result.mean_logit = result.log_sum_squares = result.logprob;
    result.is_top1 = false;
  }
}

template <class T>
RLHF_FAST_INLINE RowResult evaluate_row(const Row<T>& row, float inverse_temperature, Wanted wanted) {
  const RowSums sums = wanted == kLogprob   ? sum_row<kLogprob>(row, inverse_temperature)
                       : wanted == kEntropy ? sum_row<kEntropy>(row, inverse_temperature)
                                            : sum_row<kAll>(row, inverse_temperature);
  const float target_logit = row.target_logit();
  RowResult result = finish_row(sums, target_logit, inverse_temperature);
  if (wanted == kAll) finish_extras(sums, row.vocab(), target_logit, inverse_temperature, result);
  return result;
}

RLHF_FAST_INLINE Wanted wanted_of(const RowOutputs& to) {
  return to.logsumexp ? kAll : to.entropy ? kEntropy : kLogprob;
}

RLHF_FAST_INLINE void write_outputs(const RowOutputs& to, int64_t i, const RowResult& result) {
  to.logprobs[i] = result.logprob;
  if (to.entropy) to.entropy[i] = result.entropy;
  if (!to.logsumexp) return;
  to.logsumexp[i] = result.logsumexp;
  const float extras[kExtras] = {result.mean_logit, result.log_sum_squares, (float)result.is_top1};
  memcpy(to.extras + i * kExtras, extras, sizeof(extras));
}

// Writes e^gap * (constant + slope * gap) to all columns, times the derivative of the softcap. The target's column is
// written by write_target_gradient afterwards.
template <bool kSloped, class T, class Out>
RLHF_FAST_INLINE void write_others(const Row<T>& row, float inverse_temperature, float shift, float constant,
                                   float slope, Out* grad) {
  alignas(64) float scratch[kRowBlock];
  const float inverse_softcap = row.softcap() == 0 ? 0 : 1 / row.softcap();
  const float rate = kLog2E * inverse_temperature;
  slope *= inverse_temperature;
  over_blocks(row.vocab(), [&](int64_t start, int count) __attribute__((always_inline)) {
    row.visit_block(start, count, scratch, [&](const auto* x) __attribute__((always_inline)) {
      over_vectors(0, count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32 logit = load(x + i), gap = logit - shift;
        const F32 e = exp2_scaled(gap, rate);
        // A gap of -inf has e = 0, and 0 * -inf must be 0. A NaN in the factors still reaches the gradient.
        F32 g = e * (kSloped ? constant + slope * where(e == 0.0f, F32{}, gap) : all(constant));
        if (inverse_softcap != 0) g *= 1.0f - (logit * inverse_softcap) * (logit * inverse_softcap);
        store(grad + start + i, g, lanes);
      });
    });
  });
}

// The gradient of a loss by the outputs of a row.
struct OutputGrads {
  float logprob, entropy, logsumexp;
};

// d loss / d target's logit, before softcap and temperature.
RLHF_FAST_INLINE float target_slope(const RowStatistics& s, float logprob, float entropy, const OutputGrads& grads) {
  float slope = grads.logprob * s.others_mass;
  if (grads.logsumexp != 0) slope += grads.logsumexp * std::exp(logprob);
  if (grads.entropy == 0) return slope;
  const float far_logprob = logprob < (float)-kFar ? (float)-kFar : logprob;  // e^-inf * -inf would be NaN
  return slope - grads.entropy * std::exp(logprob) * (entropy + far_logprob);
}

template <class T, class Out>
RLHF_FAST_INLINE void write_target_gradient(const Row<T>& row, int64_t target, float target_logit,
                                            float inverse_temperature, float slope, Out* grad) {
  slope *= inverse_temperature;
  if (row.softcap() != 0) {
    const float tanh = target_logit / row.softcap();
    slope *= 1 - tanh * tanh;
  }
  if (target >= 0 && target < row.vocab()) store(grad + target, all(slope), 1);
}

// Writes d loss / d logits to `vocab` columns. `grad` may be the row itself: the caller has read the target's logit,
// and every other column is read before it is written.
template <class T, class Out>
RLHF_FAST_INLINE void write_row_gradient(const Row<T>& row, int64_t target, float target_logit, const RowStatistics& s,
                                         float inverse_temperature, float logprob, float entropy,
                                         const OutputGrads& grads, Out* grad) {
  const float scale = s.scale * inverse_temperature, plain = grads.logsumexp - grads.logprob;
  if (grads.entropy == 0) {
    write_others<false>(row, inverse_temperature, s.shift, plain * scale, 0, grad);
  } else {
    const float constant = scale * (grads.entropy * (s.log_norm - entropy) + plain);
    write_others<true>(row, inverse_temperature, s.shift, constant, -grads.entropy * scale, grad);
  }
  write_target_gradient(row, target, target_logit, inverse_temperature, target_slope(s, logprob, entropy, grads), grad);
}

template <class T>
RLHF_FAST_INLINE void zero(T* to, int64_t count) {
  if (count > 0) memset(to, 0, count * sizeof(T));
}

template <class T>
RLHF_FAST_INLINE T* row_of(const Logits& logits, int64_t i) {
  const int64_t batch = i / logits.batch_rows;
  return (T*)logits.data + batch * logits.batch_stride + (i - batch * logits.batch_rows) * logits.row_stride;
}

// New memory costs a page fault per 4 KB, which can take as long as the kernel that writes it; 2 MB pages make that 512
// times rarer. Smaller memory is not worth a call, and the allocator keeps it for later use.
constexpr int64_t kHugeBytes = 32 << 20;

template <class T>
void write_in_huge_pages(const T* data, int64_t count) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, start = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t stop = (uintptr_t)(data + count) / page * page;
  if (count * (int64_t)sizeof(T) >= kHugeBytes) madvise((void*)start, stop - start, MADV_HUGEPAGE);
#endif
}

// numbers[i], or 0 if the tensor is absent.
RLHF_FAST_INLINE float number_or_0(const float* numbers, int64_t i) { return numbers ? numbers[i] : 0; }

RLHF_FAST_INLINE float inverse_temperature_of(const Rows& rows, int64_t i) {
  return 1 / (rows.temperatures ? rows.temperatures[i * rows.temperature_stride] : rows.temperature);
}

RLHF_FAST_INLINE bool is_live(const Rows& rows, int64_t i) {
  return (!rows.live || rows.live[i]) && (!rows.targets || rows.targets[i] != rows.ignore_index);
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
