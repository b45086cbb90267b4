// Shared by the ops with one number per token: masks, the weight of a token in a loss, and loops over tokens. A task of
// parallel_for is a block of tokens. The partial sums of the blocks are added in the order of the blocks.
#pragma once

#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

RLHF_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The mask of tokens i to i + lanes - 1.
RLHF_FAST_INLINE I32 live_lanes(const uint8_t* live, int64_t i, int lanes) {
  return live ? load_mask(live + i, lanes) : first_lanes(lanes);
}

// x where a token counts, else 0. A bitwise and, not a product: a masked token may be NaN.
RLHF_FAST_INLINE F32 kept(I32 live, F32 x) { return as_float(as_bits(x) & live); }

// Splits the tokens [start, end) by sequence: calls visit(sequence, start, end) for each part.
template <class Visit>
RLHF_FAST_INLINE void over_sequences(int64_t length, int64_t start, int64_t end, const Visit& visit) {
  for (int64_t sequence = start / length; start < end; sequence++) {
    const int64_t stop = smaller((sequence + 1) * length, end);
    visit(sequence, start, stop);
    start = stop;
  }
}

RLHF_FAST_INLINE int64_t count_live(const uint8_t* live, int64_t start, int64_t end) {
  if (!live) return end - start;
  int64_t count = 0;
  for (int64_t i = start; i < end; i++) count += live[i] != 0;
  return count;
}

// Used instead of std::vector: vec.h says why this folder avoids templates of std::.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) : data_(new T[count]) {}
  ~Array() { delete[] data_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// The weight of a token in an aggregated loss, 1 / divisor: the divisors of rlhf_fast/ops/_aggregate.py.
class Shares {
 public:
  template <class Loss>
  Shares(const Loss& a, int threads)
      : differ(a.divisor.aggregation == Aggregation::seq_mean_token_mean), lengths_(differ ? a.sequences : 0) {
    const bool by_token = a.divisor.aggregation == Aggregation::token_mean;
    const int64_t tokens = a.sequences * a.length;
    const int64_t span = by_token ? kBlock : a.length;
    int64_t items = 0;
    if (a.divisor.number < 0 || differ) {
      parallel_for(by_token ? blocks_of(tokens) : a.sequences, span, threads, [&](int64_t i) {
        const int64_t count = count_live(a.live, i * span, smaller((i + 1) * span, tokens));
        if (differ) lengths_[i] = count;
        // an integer sum, so the order in which the threads add does not matter
        __atomic_fetch_add(&items, by_token ? count : count > 0, __ATOMIC_RELAXED);
      });
    }
    double divisor = a.divisor.number < 0 ? items : a.divisor.number;
    if (!(divisor > 0)) divisor = 1;
    if (a.divisor.aggregation == Aggregation::seq_mean_token_sum_norm && a.length > 0) divisor *= a.length;
    share_ = 1 / divisor;
  }

  float of(int64_t sequence) const {
    return (float)(differ && lengths_[sequence] > 0 ? share_ / lengths_[sequence] : share_);
  }

  const bool differ;  // whether the weight depends on the sequence

 private:
  Array<int64_t> lengths_;
  double share_;
};

}  // namespace rlhf_fast::RLHF_FAST_PATH
