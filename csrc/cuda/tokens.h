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

// ---- 4 tokens: one instruction if all 4 exist and are aligned, else one per token ------------------------------------

struct Values4 {
  float at[4];
};

// Loads 4 values, of which only the first `left` exist; the others are 0.
__device__ __forceinline__ Values4 load4(const float* from, int64_t left) {
  Values4 x{};
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

__device__ __forceinline__ void store4(float* to, const Values4& x, int64_t left) {
  if (left >= 4 && is_aligned<float4>(to)) {
    __stcg((float4*)to, make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
  } else {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k < left) to[k] = x.at[k];
    }
  }
}

// Bit k is set if token i + k exists and counts.
__device__ __forceinline__ unsigned live4(const uint8_t* live, int64_t i, int64_t left) {
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

// x if token k counts, else 0.
__device__ __forceinline__ float kept(unsigned live, int k, float x) { return live >> k & 1 ? x : 0; }

// The 4 tokens of this thread.
struct ThreadTokens {
  int64_t i, left;  // the index of the first one, and the number of tokens from it to the end
  unsigned live;    // bit k: token i + k counts

  __device__ __forceinline__ ThreadTokens(const uint8_t* mask, int64_t count)
      : i((int64_t)blockIdx.x * kTile + 4 * threadIdx.x), left(count - i), live(live4(mask, i, left)) {}

  __device__ __forceinline__ Values4 load(const float* from) const {
    Values4 x = load4(from + i, left);
#pragma unroll
    for (int k = 0; k < 4; k++) x.at[k] = kept(live, k, x.at[k]);
    return x;
  }

  // Stores value(k), or 0 if token k does not count.
  template <class Value>
  __device__ __forceinline__ void store(float* to, const Value& value) const {
    Values4 x;
#pragma unroll
    for (int k = 0; k < 4; k++) x.at[k] = kept(live, k, value(k));
    store4(to + i, x, left);
  }
};

// ---- the parts of a sum ----------------------------------------------------------------------------------------------

// The scratch of a launch: the ticket of `is_last` and the parts, one per tile.
template <class Part>
struct TileParts {
  unsigned* ticket;
  Part* at;

  static constexpr size_t kTicket = 16;
  static size_t bytes(int64_t tiles) { return kTicket + tiles * sizeof(Part); }

  explicit TileParts(void* scratch) : ticket((unsigned*)scratch), at((Part*)((char*)scratch + kTicket)) {}

  // Sets the ticket to 0, before a launch of `tiles` blocks. A single block takes no ticket.
  const char* reset(int64_t tiles, void* stream) const {
    return tiles > 1 ? text(cudaMemsetAsync(ticket, 0, sizeof(*ticket), (cudaStream_t)stream)) : nullptr;
  }
};

// Launches a kernel whose blocks write parts.
template <class Part, class Arguments>
const char* launch_parts(void (*kernel)(Arguments, TileParts<Part>), int64_t tiles, const TileParts<Part>& parts,
                         void* stream, const Arguments& a) {
  const char* error = parts.reset(tiles, stream);
  return error ? error : launch(kernel, tiles, kThreads, 0, stream, a, parts);
}

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
