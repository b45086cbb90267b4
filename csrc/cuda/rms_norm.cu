// Root-mean-square norm. A block takes a row. The second read of a row hits the L1 cache.
//
//   formula         y = weight * (x * scale), scale = 1 / sqrt(mean(x^2) + eps); sums in float, one rounding at the end
//   bytes a number  of b bytes: forward b read, b written; backward 2 b read, b written; and 4 a row. The gradient of a
//                   weight that is trained: 2 b read once more
//   passes          one each way
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_layers.py)
#include "hidden.h"

namespace rlhf_fast::cuda {

namespace {

// The weight's gradient is a sum over rows. A block sums a part of the rows, at least kLeastRows of them.
constexpr int64_t kLeastRows = 64, kMostParts = 256;

// Calls visit(column, left) for each vector of this thread's columns of a row.
template <class T, class Visit>
__device__ __forceinline__ void over_columns(int64_t width, const Visit& visit) {
  for (int64_t i = threadIdx.x * kVector<T>; i < width; i += kStep<T>) visit(i, width - i);
}

template <int kCount>
__device__ __forceinline__ void multiply(Numbers<kCount>& x, const float* weight, int64_t i, int64_t left) {
  if (!weight) return;
  const Numbers<kCount> factor = load_numbers<kCount>(weight + i, left);
#pragma unroll
  for (int k = 0; k < kCount; k++) x.at[k] *= factor.at[k];
}

template <class T>
__global__ void __launch_bounds__(kThreads) normalise(RmsNorm a) {
  const T* row = row_of<T>(a.hidden, blockIdx.x);
  float squares[1] = {0};
  over_columns<T>(a.width, [&](int64_t i, int64_t left) {
    const Numbers<kVector<T>> x = load_numbers<kVector<T>>(row + i, left);
#pragma unroll
    for (int k = 0; k < kVector<T>; k++) squares[0] += x.at[k] * x.at[k];
  });
  block_sum(squares);
  const float scale = 1 / sqrtf(squares[0] / a.width + a.eps);
  if (threadIdx.x == 0) a.scale[blockIdx.x] = scale;
  T* to = row_of<T>(a.normed, blockIdx.x);
  over_columns<T>(a.width, [&](int64_t i, int64_t left) {
    Numbers<kVector<T>> x = load_numbers<kVector<T>>(row + i, left);
#pragma unroll
    for (int k = 0; k < kVector<T>; k++) x.at[k] *= scale;
    multiply(x, a.weight, i, left);
    store_numbers(to + i, x, left);
  });
}

// With xhat = x * scale and p = grad * weight:
// d loss / d x = scale * (p - xhat * mean(p * xhat)), and the row's part of d loss / d weight = grad * xhat.
template <class T>
__global__ void __launch_bounds__(kThreads) differentiate(RmsNormBackward a) {
  const T* row = row_of<T>(a.hidden, blockIdx.x);
  const T* grad = row_of<T>(a.grad_normed, blockIdx.x);
  const float scale = a.scale[blockIdx.x];
  float product[1] = {0};
  over_columns<T>(a.width, [&](int64_t i, int64_t left) {
    Numbers<kVector<T>> loaded[2];
    load_numbers(loaded, {row + i, grad + i}, left);
    auto& [x, p] = loaded;
    multiply(p, a.weight, i, left);
#pragma unroll
    for (int k = 0; k < kVector<T>; k++) product[0] += p.at[k] * x.at[k];
  });
  block_sum(product);
  const float pull = scale * (product[0] * scale / a.width);
  T* to = row_of<T>(a.grad_hidden, blockIdx.x);
  over_columns<T>(a.width, [&](int64_t i, int64_t left) {
    Numbers<kVector<T>> loaded[2];
    load_numbers(loaded, {row + i, grad + i}, left);
    auto& [x, p] = loaded;
    multiply(p, a.weight, i, left);
#pragma unroll
    for (int k = 0; k < kVector<T>; k++) p.at[k] = p.at[k] * scale - (x.at[k] * scale) * pull;
    store_numbers(to + i, p, left);
  });
}

// Writes the parts of the weight's gradient. A block sums `rows` rows of kStep<T> columns.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows(RmsNormBackward a, int64_t rows, int64_t steps, float* parts) {
  const int64_t part = blockIdx.x / (unsigned)steps, step = blockIdx.x - part * steps;
  const int64_t i = step * kStep<T> + threadIdx.x * kVector<T>, left = a.width - i;
  if (left <= 0) return;
  Numbers<kVector<T>> sum{};
  for (int64_t row = part * rows; row < smaller((part + 1) * rows, a.tokens); row++) {
    Numbers<kVector<T>> loaded[2];
    load_numbers(loaded, {row_of<const T>(a.hidden, row) + i, row_of<const T>(a.grad_normed, row) + i}, left);
    const auto& [x, grad] = loaded;
    const float scale = a.scale[row];
#pragma unroll
    for (int k = 0; k < kVector<T>; k++) sum.at[k] += grad.at[k] * (x.at[k] * scale);
  }
  float* to = parts + part * a.width + i;
#pragma unroll
  for (int k = 0; k < kVector<T>; k++) {
    if (k < left) to[k] = sum.at[k];
  }
}

// Adds the parts in order.
__global__ void __launch_bounds__(kThreads) add_parts(const float* parts, int64_t count, int64_t width, float* to) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= width) return;
  float sum = 0;
  for (int64_t part = 0; part < count; part++) sum += parts[part * width + i];
  to[i] = sum;
}

}  // namespace

const char* rms_norm(const RmsNorm& a, Scratch&, void* stream) {
  return typed(a.dtype, [&](auto kind) { return launch(normalise<decltype(kind)>, a.tokens, kThreads, 0, stream, a); });
}

const char* rms_norm_backward(const RmsNormBackward& a, Scratch& scratch, void* stream) {
  const int64_t rows = larger(kLeastRows, ceil_div(a.tokens, kMostParts)), count = ceil_div(a.tokens, rows);
  float* parts = a.grad_weight ? take<float>(scratch, count * a.width) : nullptr;
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = typed(a.dtype, [&](auto kind) -> const char* {
    using T = decltype(kind);
    const char* failed = a.grad_hidden.data ? launch(differentiate<T>, a.tokens, kThreads, 0, stream, a) : nullptr;
    if (failed || !a.grad_weight) return failed;
    const int64_t steps = ceil_div(a.width, kStep<T>);
    return launch(sum_rows<T>, count * steps, kThreads, 0, stream, a, rows, steps, parts);
  });
  if (error || !a.grad_weight) return error;
  return launch(add_parts, ceil_div(a.width, kThreads), kThreads, 0, stream, (const float*)parts, count, a.width,
                a.grad_weight);
}

}  // namespace rlhf_fast::cuda
