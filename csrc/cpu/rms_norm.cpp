// Root-mean-square norm. The second read of a row hits the L1 cache.
//
//   formula         y = weight * (x * scale), scale = 1 / sqrt(mean(x^2) + eps); sums in float, one rounding at the end
//   bytes a number  of b bytes: forward b read, b written; backward 2 b read, b written; and 4 a row
//   passes          one each way
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_layers.py)
#include <cmath>

#include "hidden.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

// The sum of term(i, lanes) over the vectors of a row, in an order that depends only on the width.
template <class Term>
RLHF_FAST_INLINE float sum_row(int64_t width, const Term& term) {
  F32 sums[4]{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    for (int k = 0; k < 4; k++) sums[k] += term(i + k * kLanes, kLanes);
  }
  over_vectors(i, width, [&](int64_t j, int lanes) __attribute__((always_inline)) { sums[0] += term(j, lanes); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

RLHF_FAST_INLINE F32 weighted(F32 x, const float* weight, int64_t i, int lanes) {
  return weight ? x * load(weight + i, lanes) : x;
}

// With xhat = x * scale and p = grad * weight:
// d loss / d x = scale * (p - xhat * mean(p * xhat)), and the row's part of d loss / d weight = grad * xhat.
template <class T>
RLHF_FAST_INLINE void differentiate_row(const RmsNormBackward& a, int64_t row, T* grads, float* part) {
  const T* x = row_of<T>(a.hidden, row);
  const T* grad = row_of<T>(a.grad_normed, row);
  const float scale = a.scale[row];
  if (grads) {
    T* to = grads + row * a.grad_hidden.row_stride;
    const float product = sum_row(a.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      return weighted(load(grad + i, lanes), a.weight, i, lanes) * load(x + i, lanes);
    });
    const float pull = scale * (product * scale / a.width);
    over_vectors(0, a.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const F32 p = weighted(load(grad + i, lanes), a.weight, i, lanes);
      store(to + i, p * scale - (load(x + i, lanes) * scale) * pull, lanes);
    });
  }
  if (part) {
    over_vectors(0, a.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(part + i, load(part + i, lanes) + load(grad + i, lanes) * (load(x + i, lanes) * scale), lanes);
    });
  }
}

}  // namespace

void rms_norm(const RmsNorm& a, int threads) {
  typed(a.hidden.data, a.dtype, [&](auto* hidden) {
    parallel_for(a.tokens, a.width, threads, [&](int64_t row) {
      const auto* x = hidden + row * a.hidden.row_stride;
      auto* to = (decltype(hidden))a.normed.data + row * a.normed.row_stride;
      const float squares = sum_row(a.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32 numbers = load(x + i, lanes);
        return numbers * numbers;
      });
      const float scale = 1 / std::sqrt(squares / a.width + a.eps);
      a.scale[row] = scale;
      over_vectors(0, a.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        store(to + i, weighted(load(x + i, lanes) * scale, a.weight, i, lanes), lanes);
      });
    });
  });
}

// The weight's gradient is a sum over rows. Each task sums one part of consecutive rows; the parts, at most kMostParts,
// are then added in order.
void rms_norm_backward(const RmsNormBackward& a, int threads) {
  constexpr int64_t kMostParts = 64, kLeastRows = 16;
  const int64_t even = (a.tokens + kMostParts - 1) / kMostParts, rows = even > kLeastRows ? even : kLeastRows;
  const int64_t parts = (a.tokens + rows - 1) / rows;
  const Array<float> sums(a.grad_weight ? parts * a.width : 0);
  typed(a.hidden.data, a.dtype, [&](auto* hidden) {
    parallel_for(parts, rows * a.width, threads, [&](int64_t i) {
      float* part = a.grad_weight ? &sums[i * a.width] : nullptr;
      if (part) memset(part, 0, a.width * sizeof(float));
      for (int64_t row = i * rows; row < smaller((i + 1) * rows, a.tokens); row++) {
        differentiate_row(a, row, (decltype(hidden))a.grad_hidden.data, part);
      }
    });
  });
  if (!a.grad_weight) return;
  over_vectors(0, a.width, [&](int64_t i, int lanes) {
    F32 sum{};
    for (int64_t part = 0; part < parts; part++) sum += load(&sums[part * a.width + i], lanes);
    store(a.grad_weight + i, sum, lanes);
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
