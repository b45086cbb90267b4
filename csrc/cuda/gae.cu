// Generalised advantage estimation: a scan over each sequence from its end.
//
// A stretch of tokens is a linear function of what follows it (gae_gain of formulas.h), and stretches join. A sequence
// is cut from its start, into chunks of 32 tokens and tiles of 32 chunks: the lanes of a warp scan a chunk, then the
// chunks of a tile, and the tiles follow one another from the end. So a sequence's result depends on itself alone,
// whether a warp, a block or many blocks take it.
//
//   formula         A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, over the live tokens
//   bytes a token   8 read, 1 more where there is a mask; 8 written
//   passes          one; a long sequence that is split among blocks is read twice; whitening follows
//   error           at most that of the plain float32 formula, against float64 (tests/ops/test_accuracy.py)
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

constexpr int kChunk = kWarp;
constexpr int kChunks = 4;  // of a warp
constexpr int kSpan = kChunks * kChunk;
constexpr int kMostThreads = 256;
constexpr int kSpanOfBlock = kChunk * kWarp;
static_assert(kSpanOfBlock == kMostThreads / kWarp * kSpan);
constexpr int64_t kFull = 256;  // so many sequences keep a GPU busy with a block each

// Of a stretch: what comes out before it = gain + rate * what goes in after it.
struct Stretch {
  float rate, gain;
};

__device__ __forceinline__ float through(Stretch stretch, float later) {
  return fmaf(stretch.rate, later, stretch.gain);  // rounds alike in every kernel
}

__device__ __forceinline__ Stretch join(Stretch first, Stretch later) {
  return {first.rate * later.rate, through(first, later.gain)};
}

__device__ __forceinline__ Stretch of_lane(Stretch stretch, int lane) {
  return {__shfl_sync(kAllLanes, stretch.rate, lane), __shfl_sync(kAllLanes, stretch.gain, lane)};
}

// The lanes from this one on, joined.
__device__ __forceinline__ Stretch from_here(Stretch stretch) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Stretch later = {__shfl_down_sync(kAllLanes, stretch.rate, step),
                           __shfl_down_sync(kAllLanes, stretch.gain, step)};
    if (lane_index() + step < kWarp) stretch = join(stretch, later);
  }
  return stretch;
}

// Of what from_here gave, the lanes after this one.
__device__ __forceinline__ Stretch after_here(Stretch joined) {
  const Stretch later = of_lane(joined, smaller(lane_index() + 1, kWarp - 1));
  return lane_index() + 1 < kWarp ? later : Stretch{1, 0};
}

struct Sequence {
  int64_t start, size;
};

__device__ __forceinline__ Sequence find_sequence(const Gae& a, int64_t i) {
  if (!a.cu_seqlens) return {i * a.length, a.length};
  // wrong bounds must not lead out of the tokens
  const int64_t start = smaller(larger(a.cu_seqlens[i], (int64_t)0), a.length);
  return {start, smaller(larger(a.cu_seqlens[i + 1], start), a.length) - start};
}

// A warp's tokens of a tile: chunk k has those from 32 k on, a lane each.
struct Tokens {
  float reward[kChunks], value[kChunks];
  bool live[kChunks];

  __device__ __forceinline__ Tokens(const Gae& a, Sequence sequence, int64_t first) {
    bool inside[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; k++) {
      const int64_t t = first + k * kChunk + lane_index(), i = sequence.start + t;
      inside[k] = t < sequence.size;
      reward[k] = inside[k] ? a.rewards[i] : 0;
      value[k] = inside[k] ? a.values[i] : 0;
      live[k] = inside[k] && (!a.live || a.live[i]);
    }
#pragma unroll
    for (int k = 0; k < kChunks; k++) {
      if (!live[k]) reward[k] = value[k] = 0;
    }
  }
};

struct Rates {
  float gamma_lam, gamma_rest;
};

// Of the lanes of each chunk, from this one on.
__device__ __forceinline__ void scan_chunks(const Tokens& tokens, Rates rates, Stretch (&joined)[kChunks]) {
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    const float gain = gae_gain(tokens.reward[k], tokens.value[k], rates.gamma_lam, rates.gamma_rest);
    joined[k] = from_here(tokens.live[k] ? Stretch{rates.gamma_lam, gain} : Stretch{1, 0});
  }
}

// With lane c's stretch that of the tile's chunk c, and `carry` what goes in after the tile: writes this warp's tokens,
// whose chunks begin with number `chunk`. Returns what comes out before the tile.
__device__ __forceinline__ float finish_tile(const Gae& a, Sequence sequence, int64_t first, const Tokens& tokens,
                                             const Stretch (&joined)[kChunks], Stretch of_chunk, int chunk,
                                             float carry) {
  const Stretch from_chunk = from_here(of_chunk);
  const float into_chunk = through(after_here(from_chunk), carry);
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    const float later = through(after_here(joined[k]), __shfl_sync(kAllLanes, into_chunk, chunk + k));
    const float advantage = tokens.live[k] ? tokens.reward[k] - tokens.value[k] + later : 0;
    const int64_t t = first + k * kChunk + lane_index();
    if (t < sequence.size) {
      a.advantages[sequence.start + t] = advantage;
      a.returns[sequence.start + t] = advantage + tokens.value[k];
    }
  }
  return through(of_lane(from_chunk, 0), carry);
}

// A warp takes a padded sequence of at most kSpan tokens.
__global__ void __launch_bounds__(kMostThreads) sweep_short(Gae a, Rates rates) {
  const int64_t i = (int64_t)blockIdx.x * warps_of_block() + warp_index();
  if (i >= a.sequences) return;
  const Sequence sequence = find_sequence(a, i);
  const Tokens tokens(a, sequence, 0);
  Stretch joined[kChunks], of_chunk{1, 0};
  scan_chunks(tokens, rates, joined);
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    const Stretch chunk = of_lane(joined[k], 0);
    if (lane_index() == k) of_chunk = chunk;
  }
  finish_tile(a, sequence, 0, tokens, joined, of_chunk, 0, 0);
}

// Lane c's stretch is that of chunk c of the tile that the block has scanned. `shared` is not to be written again
// before the next barrier.
__device__ __forceinline__ Stretch share_chunks(const Stretch (&joined)[kChunks], Stretch* shared) {
  if (lane_index() == 0) {
#pragma unroll
    for (int k = 0; k < kChunks; k++) shared[warp_index() * kChunks + k] = joined[k];
  }
  __syncthreads();
  return lane_index() < warps_of_block() * kChunks ? shared[lane_index()] : Stretch{1, 0};
}

// A block takes a tile of a padded sequence: the stretch that it is.
__global__ void __launch_bounds__(kMostThreads) measure_tiles(Gae a, Rates rates, int64_t tiles, Stretch* of_tile) {
  __shared__ Stretch shared[kWarp];
  const Sequence sequence = find_sequence(a, blockIdx.x / tiles);
  const Tokens tokens(a, sequence, blockIdx.x % tiles * kSpanOfBlock + warp_index() * kSpan);
  Stretch joined[kChunks];
  scan_chunks(tokens, rates, joined);
  const Stretch tile = from_here(share_chunks(joined, shared));
  if (threadIdx.x == 0) of_tile[blockIdx.x] = tile;
}

// NaN for tokens that wrong bounds leave out.
__device__ void without_a_sequence(const Gae& a, int64_t start, int64_t stop) {
  for (int64_t i = start + threadIdx.x; i < stop; i += blockDim.x) a.advantages[i] = a.returns[i] = NAN;
}

// What goes into a tile of a sequence of `tiles`, `of_tile` being those of its tiles.
__device__ __forceinline__ float carry_into(int64_t tile, int64_t tiles, const Stretch* of_tile) {
  __shared__ Stretch shared[kMostThreads];
  float carry = 0;
  for (int64_t stop = tiles; stop > tile + 1; stop -= kMostThreads) {
    const int64_t start = larger(stop - kMostThreads, tile + 1);
    __syncthreads();
    if (threadIdx.x < stop - start) shared[threadIdx.x] = of_tile[start + threadIdx.x];
    __syncthreads();
    for (int64_t i = stop - start - 1; i >= 0; i--) carry = through(shared[i], carry);
  }
  return carry;
}

// A block takes a sequence or, with the stretches of all tiles, one tile of it.
__global__ void __launch_bounds__(kMostThreads) sweep(Gae a, Rates rates, int64_t tiles, const Stretch* of_tile) {
  __shared__ Stretch shared[2][kWarp];
  const int64_t i = of_tile ? blockIdx.x / tiles : blockIdx.x;
  const Sequence sequence = find_sequence(a, i);
  if (a.cu_seqlens) {
    if (i == 0) without_a_sequence(a, 0, sequence.start);
    if (i == a.sequences - 1) without_a_sequence(a, sequence.start + sequence.size, a.length);
  }
  const int64_t only = blockIdx.x % tiles;
  const int64_t first_tile = of_tile ? only : 0, end_tile = of_tile ? only + 1 : ceil_div(sequence.size, kSpanOfBlock);
  if (first_tile == end_tile) return;
  const int64_t own = warp_index() * kSpan;
  Tokens next(a, sequence, (end_tile - 1) * kSpanOfBlock + own);  // before the barriers of the carry
  float carry = of_tile ? carry_into(only, tiles, of_tile + i * tiles) : 0;
  for (int64_t tile = end_tile - 1; tile >= first_tile; tile--) {
    const Tokens tokens = next;
    if (tile > first_tile) next = Tokens(a, sequence, (tile - 1) * kSpanOfBlock + own);  // on its way meanwhile
    Stretch joined[kChunks];
    scan_chunks(tokens, rates, joined);
    const Stretch of_chunk = share_chunks(joined, shared[tile % 2]);
    carry =
        finish_tile(a, sequence, tile * kSpanOfBlock + own, tokens, joined, of_chunk, warp_index() * kChunks, carry);
  }
}

__global__ void __launch_bounds__(kMostThreads) without_sequences(Gae a) { without_a_sequence(a, 0, a.length); }

const char* run(const Gae& a, Stretch* of_tile, int64_t tiles, void* stream) {
  const double gamma_lam = a.gamma * a.lam;
  const Rates rates = {(float)gamma_lam, (float)(a.gamma - gamma_lam)};
  if (!a.cu_seqlens && a.length <= kSpan) {
    constexpr int kWarps = kMostThreads / kWarp;
    return launch(sweep_short, ceil_div(a.sequences, kWarps), kMostThreads, 0, stream, a, rates);
  }
  if (a.sequences == 0) return launch(without_sequences, 1, kMostThreads, 0, stream, a);  // packed, and wrongly so
  if (of_tile) {
    const char* error = launch(measure_tiles, a.sequences * tiles, kMostThreads, 0, stream, a, rates, tiles, of_tile);
    return error ? error : launch(sweep, a.sequences * tiles, kMostThreads, 0, stream, a, rates, tiles, of_tile);
  }
  const int threads =
      a.cu_seqlens ? kMostThreads : (int)ceil_div(smaller(a.length, (int64_t)kSpanOfBlock), kSpan) * kWarp;
  return launch(sweep, a.sequences, threads, 0, stream, a, rates, (int64_t)1, of_tile);
}

}  // namespace

const char* gae(const Gae& a, Scratch& scratch, void* stream) {
  const int64_t tokens = a.cu_seqlens ? a.length : a.sequences * a.length, tiles = ceil_div(a.length, kSpanOfBlock);
  if (tokens == 0) return nullptr;
  const bool split = !a.cu_seqlens && tiles > 1 && a.sequences < kFull;
  // the whitening begins when the stretches have been read
  constexpr size_t kStatistics = 32;
  scratch.needed = larger(split ? a.sequences * tiles * sizeof(Stretch) : 0,
                          a.whiten ? kStatistics + masked_whiten_scratch(tokens) : 0);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = run(a, split ? (Stretch*)scratch.data : nullptr, tiles, stream);
  if (error || !a.whiten) return error;
  Scratch rest{(char*)scratch.data + kStatistics, scratch.size - kStatistics, 0};
  return masked_whiten({tokens, a.advantages, a.live, true, true, false, (double*)scratch.data, a.advantages}, rest,
                       stream);
}

}  // namespace rlhf_fast::cuda
