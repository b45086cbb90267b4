// One row of logits: its statistics in one sweep, its gradient in another. The formulas are those of
// rlhf_fast/ops/_vocab.py: the target stands apart from the other columns, so that no step subtracts near-equal numbers.
//
// A row is read in blocks, the running maximum of which is the shift of the exponentials. Sums inside a block are float
// lanes, sums over blocks double, so a row of 151936 columns is as exact as a short one.
#pragma once

#include <cmath>

#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

constexpr int kRowBlock = 2048;
constexpr double kFar = 1e4;

RLHF_FAST_INLINE double at_most(double x, double bound) { return x > bound ? bound : x; }

// A row of logits as floats, after the softcap. The target's column (none: -1) reads as -inf, and so does whatever
// fills the last vector.
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

  // Calls `visit` with the block from `start` on, in whole vectors: with the row's own elements where they serve as they
  // are, else with floats in `scratch`.
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

// Over the columns other than the target, with gap = (x - shift) / temperature. The largest columns, whose e^gap is 1,
// are counted apart: next to a 1, a float has no digits left for a tail of 1e-8.
struct RowSums {
  float shift = -__builtin_inff();  // the largest
  int64_t tops = 0;                 // columns with it
  double rest = 0;                  // sum of e^gap over the others
  double weighted = 0;              // sum of e^gap * -gap, where asked for

  double total() const { return tops + rest; }
  double log_total() const { return tops > 0 ? std::log1p(tops - 1 + rest) : std::log(rest); }

  void raise_shift(float peak, float inverse_temperature) {
    if (!(peak > shift)) return;
    if (shift > -__builtin_inff()) {
      const double rise = ((double)peak - shift) * inverse_temperature;
      const double shrink = std::exp(-rise);
      weighted = shrink * (weighted + rise * total());
      rest = shrink * total();
      tops = 0;
    }
    shift = peak;
  }
};

// Adds a block whose largest columns are those of the row so far (kTop), or lie below.
template <bool kWeighted, bool kTop, class T>
RLHF_FAST_INLINE void add_block(const T* x, int count, float inverse_temperature, RowSums& sums) {
  const float rate = kLog2E * inverse_temperature;
  const F32 shift = all(sums.shift == -__builtin_inff() ? 0.0f : sums.shift);
  F32 rest{}, weighted{}, tops{};
  for (int i = 0; i < count; i += kLanes) {
    const F32 gap = load(x + i) - shift;
    const F32 e = exp2_scaled(gap, rate);
    rest += kTop ? where(gap == 0.0f, F32{}, e) : e;
    if (kTop) tops += where(gap == 0.0f, e, F32{});
    if (kWeighted) weighted -= where(e == 0.0f, F32{}, e * gap);
  }
  sums.rest += sum(rest);
  if (kTop) sums.tops += (int64_t)sum(tops);
  if (kWeighted) sums.weighted += (double)sum(weighted) * inverse_temperature;
}

template <bool kWeighted, class T>
RLHF_FAST_INLINE RowSums sum_row(const Row<T>& row, float inverse_temperature) {
  RowSums sums;
  alignas(64) float scratch[kRowBlock];
  over_blocks(row.vocab(), [&](int64_t start, int count) __attribute__((always_inline)) {
    row.visit_block(start, count, scratch, [&](const auto* x) __attribute__((always_inline)) {
      F32 peaks[4];
      for (int k = 0; k < 4; k++) peaks[k] = all(-__builtin_inff());
      int i = 0;
      for (; i + 3 * kLanes < count; i += 4 * kLanes) {
        for (int k = 0; k < 4; k++) peaks[k] = larger(load(x + i + k * kLanes), peaks[k]);
      }
      for (; i < count; i += kLanes) peaks[0] = larger(load(x + i), peaks[0]);
      const float peak = largest(larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3])));
      sums.raise_shift(peak, inverse_temperature);
      if (peak == sums.shift) {
        add_block<kWeighted, true>(x, count, inverse_temperature, sums);
      } else {
        add_block<kWeighted, false>(x, count, inverse_temperature, sums);
      }
    });
  });
  return sums;
}

struct RowResult {
  RowStatistics statistics;
  double log_norm;  // unrounded and unbounded
  float logprob;
  float entropy;  // where the sums are weighted
};

// d = log odds against the target: logsumexp of the others minus the target's logit.
RLHF_FAST_INLINE RowResult finish_row(const RowSums& sums, float target_logit, float inverse_temperature) {
  const bool alone = sums.shift == -__builtin_inff();
  const bool empty = alone && sums.rest == 0;
  const double total = empty ? 1 : sums.total(), log_total = empty ? 0 : sums.log_total();
  double d = ((double)sums.shift - target_logit) * inverse_temperature + log_total;
  if (target_logit == __builtin_inff()) d = __builtin_nan("");
  const double certainty = std::fabs(d), odds = std::exp(-certainty), softplus = std::log1p(odds);
  const double likelier = 1 / (1 + odds), unlikelier = odds * likelier;  // of the target and the others
  const double mass = d > 0 ? likelier : unlikelier;
  const double split = unlikelier * at_most(certainty, kFar) + softplus;
  const double spread = log_total + sums.weighted / total;
  RowResult result;
  result.statistics.shift = alone ? 0 : sums.shift;
  result.statistics.others_mass = (float)mass;
  result.statistics.scale = (float)(mass / total);
  result.log_norm = log_total + (d < 0 ? -d : 0) + softplus;
  result.statistics.log_norm = (float)at_most(result.log_norm, kFar);
  result.logprob = (float)-((d > 0 ? d : 0) + softplus);
  result.entropy = (float)(split + mass * spread);
  return result;
}

template <class T>
RLHF_FAST_INLINE RowResult evaluate_row(const Row<T>& row, float inverse_temperature, bool want_entropy) {
  const RowSums sums = want_entropy ? sum_row<true>(row, inverse_temperature) : sum_row<false>(row, inverse_temperature);
  return finish_row(sums, row.target_logit(), inverse_temperature);
}

// p_j-like: e^gap * (constant + slope * gap), and the softcap's own slope.
template <bool kSloped, class T, class Out>
RLHF_FAST_INLINE void write_others(const Row<T>& row, float inverse_temperature, float shift, float constant, float slope,
                                   Out* grad) {
  alignas(64) float scratch[kRowBlock];
  const float inverse_softcap = row.softcap() == 0 ? 0 : 1 / row.softcap();
  const float rate = kLog2E * inverse_temperature;
  slope *= inverse_temperature;
  over_blocks(row.vocab(), [&](int64_t start, int count) __attribute__((always_inline)) {
    row.visit_block(start, count, scratch, [&](const auto* x) __attribute__((always_inline)) {
      over_vectors(0, count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32 logit = load(x + i), gap = logit - shift;
        const F32 e = exp2_scaled(gap, rate);
        // an infinite gap meets 0, but a NaN in the factors has to show
        F32 g = e * (kSloped ? constant + slope * where(e == 0.0f, F32{}, gap) : all(constant));
        if (inverse_softcap != 0) g *= 1.0f - (logit * inverse_softcap) * (logit * inverse_softcap);
        store(grad + start + i, g, lanes);
      });
    });
  });
}

// grad_logprob * d logprob + grad_entropy * d entropy, by the target's logit as it is after cap and temperature.
RLHF_FAST_INLINE float target_slope(const RowStatistics& s, float logprob, float entropy, float grad_logprob,
                                    float grad_entropy) {
  const float slope = grad_logprob * s.others_mass;
  if (grad_entropy == 0) return slope;
  const float far_logprob = logprob < (float)-kFar ? (float)-kFar : logprob;
  return slope - grad_entropy * std::exp(logprob) * (entropy + far_logprob);
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

// grad_logprob * d logprob / d logits + grad_entropy * d entropy / d logits, over `vocab` columns. `grad` may be the row.
template <class T, class Out>
RLHF_FAST_INLINE void write_row_gradient(const Row<T>& row, int64_t target, float target_logit, const RowStatistics& s,
                                         float inverse_temperature, float logprob, float entropy, float grad_logprob,
                                         float grad_entropy, Out* grad) {
  const float scale = s.scale * inverse_temperature;
  if (grad_entropy == 0) {
    write_others<false>(row, inverse_temperature, s.shift, -grad_logprob * scale, 0, grad);
  } else {
    const float constant = scale * (grad_entropy * (s.log_norm - entropy) - grad_logprob);
    write_others<true>(row, inverse_temperature, s.shift, constant, -grad_entropy * scale, grad);
  }
  write_target_gradient(row, target, target_logit, inverse_temperature,
                        target_slope(s, logprob, entropy, grad_logprob, grad_entropy), grad);
}

template <class T>
RLHF_FAST_INLINE void zero(T* to, int64_t count) {
  if (count > 0) memset(to, 0, count * sizeof(T));
}

template <class T>
RLHF_FAST_INLINE T* row_of(const Logits& logits, int64_t i) {
  return (T*)logits.data + i * logits.row_stride;
}

RLHF_FAST_INLINE float inverse_temperature_of(const Rows& rows, int64_t i) {
  return 1 / rows.temperature[i * rows.temperature_stride];
}

RLHF_FAST_INLINE bool is_live(const Rows& rows, int64_t i) { return !rows.live || rows.live[i]; }

}  // namespace rlhf_fast::RLHF_FAST_PATH
