// Shared by the ops with one number per token. A block takes a tile of tokens, a thread 4 consecutive ones by a 16-byte
// load. For a sum over several tiles each block writes its partial sum, its "part", to the scratch, and the last block
// of the launch adds the parts in the order of the tiles. Sums are float within a tile and double over tiles.
#pragma once

#include "device.h"

namespace rlhf_fast::cuda {

constexpr int kThreads = 256;
constexpr int kTile = 4 * kThreads;

// At least one tile, so that results are written even for no tokens.
inline int64_t tiles_of(int64_t count) { return larger(ceil_div(count, kTile), (int64_t)1); }

RLHF_FAST_INLINE double at_least_1(double x) { return x > 1 ? x : 1; }

// ---- the 4 tokens of a thread -----------------------------------------------------------------------------------------

struct Values4 {
  float at[4];
};

// x if token k counts, else 0.
__device__ __forceinline__ float kept(unsigned live, int k, float x) { return live >> k & 1 ? x : 0; }

// 4 tokens and their values in N arrays. Where all arrays are aligned, each is one load, and all loads are issued
// before the first use of a result, so that they are in flight together.
template <int N>
struct ThreadTokens {
  int64_t i, left;  // the index of the first token, and the number of tokens from it to the end
  unsigned live;    // bit k: token i + k exists and counts
  Values4 of[N];    // of each array: 0 for a token that does not count, and if the array is absent

  // `mask` is absent if all tokens count.
  __device__ __forceinline__ ThreadTokens(const uint8_t* mask, int64_t count, const float* const (&arrays)[N])
      : i((int64_t)blockIdx.x * kTile + 4 * threadIdx.x), left(count - i), live(0), of{} {
    uintptr_t addresses = (uintptr_t)mask * 4;  // 4 bytes of the mask are one load
#pragma unroll
    for (int n = 0; n < N; n++) addresses |= (uintptr_t)arrays[n];
    if (left >= 4 && addresses % sizeof(float4) == 0) {
      const unsigned bytes = mask ? __ldcg((const unsigned*)(mask + i)) : 0x01010101;
      float4 whole[N];
#pragma unroll
      for (int n = 0; n < N; n++) whole[n] = arrays[n] ? __ldcg((const float4*)(arrays[n] + i)) : float4{};
#pragma unroll
      for (int k = 0; k < 4; k++) live |= (bytes >> 8 * k & 0xff ? 1u : 0u) << k;
#pragma unroll
      for (int n = 0; n < N; n++) of[n] = {{whole[n].x, whole[n].y, whole[n].z, whole[n].w}};
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (k >= left) continue;
        live |= (!mask || mask[i + k] ? 1u : 0u) << k;
#pragma unroll
        for (int n = 0; n < N; n++) of[n].at[k] = arrays[n] ? arrays[n][i + k] : 0;
      }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int k = 0; k < 4; k++) of[n].at[k] = kept(live, k, of[n].at[k]);
    }
  }

  // Stores value(k), or 0 if token k does not count.
  template <class Value>
  __device__ __forceinline__ void store(float* to, const Value& value) const {
    Values4 x;
#pragma unroll
    for (int k = 0; k < 4; k++) x.at[k] = kept(live, k, value(k));
    if (left >= 4 && is_aligned<float4>(to)) {
      __stcg((float4*)(to + i), make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (k < left) to[i + k] = x.at[k];
      }
    }
  }
};

// ---- the parts of a sum ----------------------------------------------------------------------------------------------

// The parts of a launch, one per tile, and the ticket of `is_last`.
template <class Part>
struct TileParts {
  Part* at;
  unsigned* ticket;

  TileParts(Scratch& scratch, int64_t tiles) : at(take<Part>(scratch, tiles)), ticket(scratch.ticket) {}
};

// ---- moments ---------------------------------------------------------------------------------------------------------

// Number, mean and sum of squared deviations from the mean of the live elements.
struct Moments {
  double count, mean, deviation;
};

__device__ __forceinline__ Moments tile_moments(const Values4& x, unsigned live) {
  float sums[2] = {(float)__popc(live), x.at[0] + x.at[1] + (x.at[2] + x.at[3])};
  block_sum(sums);
  const float count = sums[0], divisor = larger(count, 1.0f), near = sums[1] / divisor;
  // Sums of deviations from `near`, because a sum of squares of x would cancel. The mean of the deviations is the
  // rounding error of `near`.
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

// The bytes of scratch that masked_whiten needs if its statistics are not given.
size_t masked_whiten_scratch(int64_t count);

}  // namespace rlhf_fast::cuda
