// Whitening: mean 0 and variance 1 over the live elements. `whitened` may be `x` itself.
//
// All arithmetic is double, so that a mean far from 0 loses no precision. The loops are still memory-bound.
//
//   formula         (x - mean) / sqrt(variance + 1e-8)
//   bytes a value   forward 12 read, 4 written; backward 16 read, 4 written
//   passes          forward three (mean, deviations, result), backward two
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include <cmath>

#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// Vectors of kDoubles doubles, int64s, floats and bytes.
constexpr int kDoubles = kLanes / 2;
typedef double F64 __attribute__((vector_size(8 * kDoubles)));
typedef int64_t I64 __attribute__((vector_size(8 * kDoubles)));
typedef float Singles __attribute__((vector_size(4 * kDoubles)));
typedef uint8_t Bytes __attribute__((vector_size(kDoubles)));

RLHF_FAST_INLINE F64 load_doubles(const float* from, int lanes) {
  return __builtin_convertvector(load_raw<Singles>(from, lanes), F64);
}

RLHF_FAST_INLINE I64 live_doubles(const uint8_t* live, int64_t i, int lanes) {
  if (live) return __builtin_convertvector(load_raw<Bytes>(live + i, lanes) != 0, I64);
  I64 lane{};
  for (int k = 0; k < kDoubles; k++) lane[k] = k;
  return lane < lanes;
}

RLHF_FAST_INLINE F64 kept(I64 live, F64 x) { return (F64)((I64)x & live); }

// Calls visit(i, lanes, live) for each vector of the elements of a block.
template <class Visit>
RLHF_FAST_INLINE void over_block(int64_t block, int64_t count, const uint8_t* live, const Visit& visit) {
  const int64_t end = smaller((block + 1) * kBlock, count);
  int64_t i = block * kBlock;
  for (; i + kDoubles <= end; i += kDoubles) visit(i, kDoubles, live_doubles(live, i, kDoubles));
  if (i < end) visit(i, (int)(end - i), live_doubles(live, i, (int)(end - i)));
}

struct Terms {
  F64 first, second;
};

struct Sums {
  double first, second;
};

// The sums of term(i, lanes) over the live elements: per lane within a block, then over lanes and blocks in order.
template <class Arguments, class Term>
RLHF_FAST_INLINE Sums sum_live(const Arguments& a, int threads, const Term& term) {
  const Array<Sums> blocks(blocks_of(a.elements));
  parallel_for(blocks_of(a.elements), kBlock, threads, [&](int64_t block) {
    F64 first{}, second{};
    over_block(block, a.elements, a.live, [&](int64_t i, int lanes, I64 live) __attribute__((always_inline)) {
      const Terms terms = term(i, lanes);
      first += kept(live, terms.first);
      second += kept(live, terms.second);
    });
    blocks[block] = {};
    for (int lane = 0; lane < kDoubles; lane++) {
      blocks[block].first += first[lane];
      blocks[block].second += second[lane];
    }
  });
  Sums sums{};
  for (int64_t block = 0; block < blocks_of(a.elements); block++) {
    sums.first += blocks[block].first;
    sums.second += blocks[block].second;
  }
  return sums;
}

// Writes value(i, lanes) to the live elements and 0 to the others.
template <class Arguments, class Value>
RLHF_FAST_INLINE void write_live(const Arguments& a, float* to, int threads, const Value& value) {
  parallel_for(blocks_of(a.elements), kBlock, threads, [&](int64_t block) {
    over_block(block, a.elements, a.live, [&](int64_t i, int lanes, I64 live) __attribute__((always_inline)) {
      store_raw(to + i, __builtin_convertvector(kept(live, value(i, lanes)), Singles), lanes);
    });
  });
}

double at_least_1(double x) { return x > 1 ? x : 1; }

}  // namespace

void masked_moments(const MaskedMoments& a, int threads) {
  const double mean = a.mean ? *a.mean : 0;
  const Sums sums = sum_live(a, threads, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const F64 x = load_doubles(a.x + i, lanes) - mean;
    return Terms{F64{} + 1, a.mean ? x * x : x};
  });
  a.moments[0] = sums.first;
  a.moments[1] = sums.second;
}

void masked_whiten(const MaskedWhiten& a, int threads) {
  if (!a.given) {
    // The second pass sums squared deviations from the mean, because E[x^2] - mean^2 would cancel.
    double moments[2];
    masked_moments({a.elements, a.x, a.live, nullptr, moments}, threads);
    a.statistics[0] = moments[0];
    a.statistics[1] = moments[1] / at_least_1(moments[0]);
    masked_moments({a.elements, a.x, a.live, &a.statistics[1], moments}, threads);
    a.statistics[2] = 1 / std::sqrt(moments[1] / at_least_1(moments[0] - a.unbiased) + 1e-8);
  }
  const double mean = a.statistics[1], scale = a.statistics[2], shift = a.shift_mean ? 0 : mean;
  write_live(a, a.whitened, threads, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    return (load_doubles(a.x + i, lanes) - mean) * scale + shift;
  });
}

// With d = x - mean and variance = sum(d^2) / k:
// d loss / d x = scale * (grad - mean(grad)) - d * scale^3 * sum(grad * d) / k, and + mean(grad) without shift_mean.
void masked_whiten_backward(const MaskedWhitenBackward& a, int threads) {
  const double count = a.statistics[0], mean = a.statistics[1], scale = a.statistics[2];
  const Sums sums = sum_live(a, threads, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const F64 grad = load_doubles(a.grad_whitened + i, lanes);
    return Terms{grad, grad * (load_doubles(a.x + i, lanes) - mean)};
  });
  const double mean_grad = sums.first / at_least_1(count);
  const double shift = (a.shift_mean ? 0 : mean_grad) - scale * mean_grad;
  const double slope = -scale * scale * scale * sums.second / at_least_1(count - a.unbiased);
  write_live(a, a.grad, threads, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const F64 deviation = load_doubles(a.x + i, lanes) - mean;
    return load_doubles(a.grad_whitened + i, lanes) * scale + deviation * slope + shift;
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
