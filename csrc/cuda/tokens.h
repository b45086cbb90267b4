// Ops of a number a token: a block takes a tile of tokens, a thread 4 in a row. Where a sum goes over several tiles,
// each leaves its part in the scratch, and the launch's last block adds the parts in the tiles' order: float within a
// tile, double over tiles.
#pragma once

#include "device.h"

namespace rlhf_fast::cuda {

constexpr int kThreads = 256;
constexpr int kTile = 4 * kThreads;

// At least one, so that an empty sum is written too.
inline int64_t tiles_of(int64_t count) { return larger(ceil_div(count, kTile), (int64_t)1); }

RLHF_FAST_INLINE double at_least_1(double x) { return x > 1 ? x : 1; }

// ---- 4 tokens, by one instruction where they are whole and aligned ---------------------------------------------------

struct Four {
  float at[4];
};

// Those from `from` on, at most `left`; the rest is 0.
__device__ __forceinline__ Four load_four(const float* from, int64_t left) {
  Four x{};
  if (left >= 4 && is_aligned<float4>(from)) {
    const float4 whole = __ldcg((const float4*)from);
    x = {{whole.x, whole.y, whole.z, whole.w}};
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k < left) x.at[k] = from[k];
    }
  }
  return x;
}

__device__ __forceinline__ void store_four(float* to, const Four& x, int64_t left) {
  if (left >= 4 && is_aligned<float4>(to)) {
    __stcg((float4*)to, make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k < left) to[k] = x.at[k];
    }
  }
}

// Bit k: whether token i + k counts, of at most `left`.
__device__ __forceinline__ unsigned live_four(const uint8_t* live, int64_t i, int64_t left) {
  unsigned found = left >= 4 ? 0xf : left > 0 ? (1u << left) - 1 : 0;
  if (!live) return found;
  if (left >= 4 && is_aligned<unsigned>(live + i)) {
    const unsigned bytes = __ldcg((const unsigned*)(live + i));
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (!(bytes >> 8 * k & 0xff)) found &= ~(1u << k);
    }
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k < left && !live[i + k]) found &= ~(1u << k);
    }
  }
  return found;
}

// x where it counts, else 0.
__device__ __forceinline__ float kept(unsigned live, int k, float x) { return live >> k & 1 ? x : 0; }

// This thread's elements of the tile: their place, how many there are from it on, and which count.
struct Place {
  int64_t i, left;
  unsigned live;

  __device__ __forceinline__ Place(const uint8_t* mask, int64_t count)
      : i((int64_t)blockIdx.x * kTile + 4 * threadIdx.x), left(count - i), live(live_four(mask, i, left)) {}

  __device__ __forceinline__ Four load(const float* from) const {
    Four x = load_four(from + i, left);
#pragma unroll
    for (int k = 0; k < 4; k++) x.at[k] = kept(live, k, x.at[k]);
    return x;
  }

  // value(k) where it counts, else 0.
  template <class Value>
  __device__ __forceinline__ void store(float* to, const Value& value) const {
    Four x;
#pragma unroll
    for (int k = 0; k < 4; k++) x.at[k] = kept(live, k, value(k));
    store_four(to + i, x, left);
  }
};

// ---- parts -----------------------------------------------------------------------------------------------------------

// The parts, and the ticket of `is_last`, in a launch's scratch.
template <class Part>
struct TileParts {
  unsigned* ticket;
  Part* at;

  static constexpr size_t kTicket = 16;
  static size_t bytes(int64_t tiles) { return kTicket + tiles * sizeof(Part); }

  explicit TileParts(void* scratch) : ticket((unsigned*)scratch), at((Part*)((char*)scratch + kTicket)) {}

  // Of a launch of so many blocks.
  const char* reset(int64_t tiles, void* stream) const {
    return tiles > 1 ? text(cudaMemsetAsync(ticket, 0, sizeof(*ticket), (cudaStream_t)stream)) : nullptr;
  }
};

// Launches a kernel whose blocks leave parts.
template <class Part, class Arguments>
const char* launch_parts(void (*kernel)(Arguments, TileParts<Part>), int64_t tiles, const TileParts<Part>& parts,
                         void* stream, const Arguments& a) {
  const char* error = parts.reset(tiles, stream);
  return error ? error : launch(kernel, tiles, kThreads, 0, stream, a, parts);
}

// ---- moments ---------------------------------------------------------------------------------------------------------

// Of the live elements: the mean and the sum of squared deviations from it.
struct Moments {
  double count, mean, deviation;
};

__device__ __forceinline__ Moments tile_moments(const Four& x, unsigned live) {
  float sums[2] = {(float)__popc(live), x.at[0] + x.at[1] + (x.at[2] + x.at[3])};
  block_sum(sums);
  const float count = sums[0], divisor = larger(count, 1.0f), near = sums[1] / divisor;
  // deviations from the rounded mean also tell how far off it is
  float deviations[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float deviation = kept(live, k, x.at[k] - near);
    deviations[0] += deviation;
    deviations[1] += deviation * deviation;
  }
  block_sum(deviations);
  const float off = deviations[0] / divisor, deviation = deviations[1] - count * off * off;
  return {count, (double)near + off, deviation < 0 ? 0 : deviation};
}

// The bytes of scratch of masked_whiten, whose statistics are not given.
size_t masked_whiten_scratch(int64_t count);

}  // namespace rlhf_fast::cuda
