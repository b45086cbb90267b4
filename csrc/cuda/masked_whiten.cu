// Whitening: mean 0 and variance 1 over the live elements. `whitened` may be `x` itself.
//
// Only the sums over tiles are double; double arithmetic per element would be slow on a GPU. A mean far from 0 still
// loses no precision: the moments of a tile are relative to its own mean, and deviations are computed from a mean that
// is the sum of two floats.
//
//   formula         (x - mean) / sqrt(variance + 1e-8)
//   bytes a value   forward 8 read, 4 written; backward 16 read, 4 written; half as much for one tile
//   passes          two each way; one for a single tile
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

constexpr double kEpsilon = 1e-8;  // added to the variance, as in rlhf_fast/ops/masked_whiten.py

struct alignas(16) Part {
  float count, deviation;
  double mean;
};

// The moments of all tiles; every thread of the block gets them. A second loop over the parts, which are in L2,
// computes the deviations from the final mean, so that nothing cancels.
__device__ __forceinline__ Moments merge_moments(const Part* parts, int64_t tiles) {
  double sums[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) {
    const Part part = load_part(parts + i);
    sums[0] += part.count;
    sums[1] += part.count * part.mean;
  }
  block_sum(sums);
  const double mean = sums[1] / at_least_1(sums[0]);
  double deviation[1] = {0};
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) {
    const Part part = load_part(parts + i);
    const double step = part.mean - mean;
    deviation[0] += part.deviation + part.count * step * step;
  }
  block_sum(deviation);
  return {sums[0], mean, deviation[0]};
}

// Writes the moments of this block's tile. Returns true in the last block of the launch.
__device__ __forceinline__ bool write_moments(const float* x, const uint8_t* live, int64_t count,
                                              TileParts<Part> parts) {
  const ThreadTokens tokens(live, count, {x});
  const Moments moments = tile_moments(tokens.of[0], tokens.live);
  if (threadIdx.x == 0) parts.at[blockIdx.x] = {(float)moments.count, (float)moments.deviation, moments.mean};
  return is_last(parts.ticket);
}

__global__ void __launch_bounds__(kThreads) measure(MaskedMoments a, TileParts<Part> parts) {
  if (!write_moments(a.x, a.live, a.elements, parts)) return;
  const Moments all = merge_moments(parts.at, gridDim.x);
  if (threadIdx.x != 0) return;
  const double step = a.mean ? all.mean - *a.mean : 0;
  a.moments[0] = all.count;
  a.moments[1] = a.mean ? all.deviation + all.count * step * step : all.count * all.mean;
}

struct Statistics {
  double count, mean, scale;

  __device__ __forceinline__ explicit Statistics(const double* from) : count(from[0]), mean(from[1]), scale(from[2]) {}

  __device__ __forceinline__ Statistics(const Moments& moments, bool unbiased, double* to)
      : count(moments.count),
        mean(moments.mean),
        scale(1 / sqrt(moments.deviation / at_least_1(count - unbiased) + kEpsilon)) {
    if (threadIdx.x == 0) to[0] = count, to[1] = mean, to[2] = scale;
  }

  // x - mean in float. The double mean is split into two floats, so it is not rounded.
  __device__ __forceinline__ float deviation(float x) const {
    const float near = (float)mean;
    return (x - near) - (float)(mean - near);
  }
};

__global__ void __launch_bounds__(kThreads) find_statistics(MaskedWhiten a, TileParts<Part> parts) {
  if (!write_moments(a.x, a.live, a.elements, parts)) return;
  Statistics(merge_moments(parts.at, gridDim.x), a.unbiased, a.statistics);
}

__device__ __forceinline__ void write_whitened(const MaskedWhiten& a, const ThreadTokens<1>& tokens,
                                               const Statistics& statistics) {
  const Values4& x = tokens.of[0];
  const float scale = (float)statistics.scale, shift = a.shift_mean ? 0 : (float)statistics.mean;
  tokens.store(a.whitened, [&](int k) { return statistics.deviation(x.at[k]) * scale + shift; });
}

__global__ void __launch_bounds__(kThreads) whiten(MaskedWhiten a) {
  write_whitened(a, ThreadTokens(a.live, a.elements, {a.x}), Statistics(a.statistics));
}

__global__ void __launch_bounds__(kThreads) whiten_one_tile(MaskedWhiten a) {
  const ThreadTokens tokens(a.live, a.elements, {a.x});
  write_whitened(a, tokens, Statistics(tile_moments(tokens.of[0], tokens.live), a.unbiased, a.statistics));
}

// ---- backward ------------------------------------------------------------------------------------------------------
//
// With d = x - mean and variance = sum(d^2) / k:
// d loss / d x = scale * (grad - mean(grad)) - d * scale^3 * sum(grad * d) / k, and + mean(grad) without shift_mean.

struct alignas(16) GradientSums {
  double grad, product;
};

// The tokens of a backward pass: the upstream gradient, and x.
__device__ __forceinline__ ThreadTokens<2> tokens_of(const MaskedWhitenBackward& a) {
  return {a.live, a.elements, {a.grad_whitened, a.x}};
}

__device__ __forceinline__ GradientSums tile_sums(const ThreadTokens<2>& tokens, const Statistics& statistics) {
  const Values4 &grad = tokens.of[0], &x = tokens.of[1];
  float sums[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 4; k++) {
    sums[0] += grad.at[k];
    sums[1] += grad.at[k] * kept(tokens.live, k, statistics.deviation(x.at[k]));
  }
  block_sum(sums);
  return {sums[0], sums[1]};
}

__device__ __forceinline__ void write_gradient(const MaskedWhitenBackward& a, const ThreadTokens<2>& tokens,
                                               const Statistics& statistics, const GradientSums& sums) {
  const Values4 &grad = tokens.of[0], &x = tokens.of[1];
  const double scale = statistics.scale, mean = sums.grad / at_least_1(statistics.count);
  const double slope = -scale * scale * scale * sums.product / at_least_1(statistics.count - a.unbiased);
  const float near = (float)mean, off = (float)(mean - near), shift = a.shift_mean ? 0 : near;
  tokens.store(a.grad, [&](int k) {
    return ((grad.at[k] - near) - off) * (float)scale + statistics.deviation(x.at[k]) * (float)slope + shift;
  });
}

// The last block replaces the first tile's part by the sums of all tiles.
__global__ void __launch_bounds__(kThreads, 4) measure_backward(MaskedWhitenBackward a, TileParts<GradientSums> parts) {
  const GradientSums own = tile_sums(tokens_of(a), Statistics(a.statistics));
  if (threadIdx.x == 0) parts.at[blockIdx.x] = own;
  if (!is_last(parts.ticket)) return;
  double sums[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < gridDim.x; i += kThreads) {
    const GradientSums part = load_part(parts.at + i);
    sums[0] += part.grad;
    sums[1] += part.product;
  }
  block_sum(sums);
  if (threadIdx.x == 0) parts.at[0] = {sums[0], sums[1]};
}

__global__ void __launch_bounds__(kThreads) whiten_backward(MaskedWhitenBackward a, const GradientSums* sums) {
  write_gradient(a, tokens_of(a), Statistics(a.statistics), *sums);
}

__global__ void __launch_bounds__(kThreads) whiten_backward_one_tile(MaskedWhitenBackward a) {
  const ThreadTokens<2> tokens = tokens_of(a);
  const Statistics statistics(a.statistics);
  write_gradient(a, tokens, statistics, tile_sums(tokens, statistics));
}

}  // namespace

const char* masked_moments(const MaskedMoments& a, Scratch& scratch, void* stream) {
  const int64_t tiles = tiles_of(a.elements);
  const TileParts<Part> parts(scratch, tiles);
  if (scratch.size < scratch.needed) return nullptr;
  return launch(measure, tiles, kThreads, 0, stream, a, parts);
}

size_t masked_whiten_scratch(int64_t count) {
  const int64_t tiles = tiles_of(count);
  return tiles > 1 ? tiles * sizeof(Part) : 0;
}

const char* masked_whiten(const MaskedWhiten& a, Scratch& scratch, void* stream) {
  const int64_t tiles = tiles_of(a.elements);
  if (tiles == 1 && !a.given) return launch(whiten_one_tile, 1, kThreads, 0, stream, a);
  if (!a.given) {
    const TileParts<Part> parts(scratch, tiles);
    if (scratch.size < scratch.needed) return nullptr;
    if (const char* error = launch(find_statistics, tiles, kThreads, 0, stream, a, parts)) return error;
  }
  return launch(whiten, tiles, kThreads, 0, stream, a);
}

const char* masked_whiten_backward(const MaskedWhitenBackward& a, Scratch& scratch, void* stream) {
  const int64_t tiles = tiles_of(a.elements);
  if (tiles == 1) return launch(whiten_backward_one_tile, 1, kThreads, 0, stream, a);
  const TileParts<GradientSums> parts(scratch, tiles);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = launch(measure_backward, tiles, kThreads, 0, stream, a, parts);
  return error ? error : launch(whiten_backward, tiles, kThreads, 0, stream, a, (const GradientSums*)parts.at);
}

}  // namespace rlhf_fast::cuda
