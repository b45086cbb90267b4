// Generalised advantage estimation: a scan over each sequence from its end.
//
// The recurrence carries one number g from a token to the one before it (gae_gain of formulas.h). A run of consecutive
// tokens maps the g after it to its own by an affine map: g = gain + rate * later. Two neighbouring runs compose to
// another affine map, and composition is associative, so a parallel scan computes all of them. A masked token is the
// identity.
//
// A sequence is split from its start into chunks of 32 tokens and tiles of 32 chunks. The lanes of a warp scan the
// tokens of a chunk, then the chunks of a tile; the tiles are processed from the last to the first. The order is the
// same, and so is the result, whether a warp, a block or many blocks compute the sequence.
//
//   formula         A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, over the live tokens
//   bytes a token   8 read, 1 more with a mask; 8 written
//   passes          one; of a sequence that is split among blocks, all tiles but the first are read twice; whitening
//                   follows
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "tokens.h"

namespace rlhf_fast::cuda {

namespace {

constexpr int kChunk = kWarp;
constexpr int kChunks = 4;               // chunks of a warp, whose loads are in flight together
constexpr int kSpan = kChunks * kChunk;  // tokens of a warp
constexpr int kMostThreads = 256;
constexpr int kSpanOfBlock = kChunk * kWarp;
static_assert(kSpanOfBlock == kMostThreads / kWarp * kSpan);
constexpr int64_t kFillsGpu = 256;  // with this many sequences, one block per sequence fills a GPU

// The affine map of a run of tokens: g before it = gain + rate * (g after it).
struct Affine {
  float rate, gain;
};

__device__ __forceinline__ float apply(Affine map, float later) {
  return fmaf(map.rate, later, map.gain);  // explicit, so that all kernels round alike
}

__device__ __forceinline__ Affine join(Affine first, Affine later) {
  return {first.rate * later.rate, apply(first, later.gain)};
}

__device__ __forceinline__ Affine of_lane(Affine map, int lane) {
  return {__shfl_sync(kAllLanes, map.rate, lane), __shfl_sync(kAllLanes, map.gain, lane)};
}

// An inclusive scan from the end: the map of this lane and all later lanes.
__device__ __forceinline__ Affine scan_from_end(Affine map) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Affine later = {__shfl_down_sync(kAllLanes, map.rate, step), __shfl_down_sync(kAllLanes, map.gain, step)};
    if (lane_index() + step < kWarp) map = join(map, later);
  }
  return map;
}

// The exclusive scan, from the inclusive one: the map of all lanes after this one.
__device__ __forceinline__ Affine exclusive(Affine joined) {
  const Affine later = of_lane(joined, smaller(lane_index() + 1, kWarp - 1));
  return lane_index() + 1 < kWarp ? later : Affine{1, 0};
}

struct Sequence {
  int64_t start, size;
};

__device__ __forceinline__ Sequence sequence_of(const Gae& a, int64_t i) {
  if (!a.cu_seqlens) return {i * a.length, a.length};
  // Clamped, because measure_tiles reads tokens before it is known whether the bounds are wrong.
  const int64_t start = smaller(larger(a.cu_seqlens[i], (int64_t)0), a.length);
  return {start, smaller(larger(a.cu_seqlens[i + 1], start), a.length) - start};
}

// The tokens of a warp: chunk k has the tokens 32 k to 32 k + 31, one per lane.
struct Tokens {
  float reward[kChunks], value[kChunks];
  bool live[kChunks];

  __device__ __forceinline__ Tokens(const Gae& a, Sequence sequence, int64_t first) {
    // Masked tokens are loaded too and set to 0 afterwards, so that the loads do not wait for the mask.
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

// The inclusive scan of each chunk, from its end.
__device__ __forceinline__ void scan_chunks(const Tokens& tokens, Rates rates, Affine (&joined)[kChunks]) {
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    const float gain = gae_gain(tokens.reward[k], tokens.value[k], rates.gamma_lam, rates.gamma_rest);
    joined[k] = scan_from_end(tokens.live[k] ? Affine{rates.gamma_lam, gain} : Affine{1, 0});
  }
}

// Writes the tokens of this warp, whose first chunk is number `chunk` of the tile. Lane c has the map of chunk c in
// `of_chunk`. `carry` is g after the tile. Returns g before the tile.
__device__ __forceinline__ float write_tile(const Gae& a, Sequence sequence, int64_t first, const Tokens& tokens,
                                            const Affine (&joined)[kChunks], Affine of_chunk, int chunk, float carry) {
  // 1. g after each chunk of the tile, in lane c for chunk c, by a scan over the chunks.
  const Affine from_chunk = scan_from_end(of_chunk);
  const float into_chunk = apply(exclusive(from_chunk), carry);
  // 2. g after each token, from g after its chunk; then the advantage.
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    const float later = apply(exclusive(joined[k]), __shfl_sync(kAllLanes, into_chunk, chunk + k));
    const float advantage = tokens.live[k] ? tokens.reward[k] - tokens.value[k] + later : 0;
    const int64_t t = first + k * kChunk + lane_index();
    if (t < sequence.size) {
      a.advantages[sequence.start + t] = advantage;
      a.returns[sequence.start + t] = advantage + tokens.value[k];
    }
  }
  return apply(of_lane(from_chunk, 0), carry);
}

// One warp per padded sequence, of at most kSpan tokens: no shared memory and no barrier.
__global__ void __launch_bounds__(kMostThreads) sweep_short(Gae a, Rates rates) {
  const int64_t i = (int64_t)blockIdx.x * warps_of_block() + warp_index();
  if (i >= a.sequences) return;
  const Sequence sequence = sequence_of(a, i);
  const Tokens tokens(a, sequence, 0);
  Affine joined[kChunks], of_chunk{1, 0};
  scan_chunks(tokens, rates, joined);
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    const Affine chunk = of_lane(joined[k], 0);
    if (lane_index() == k) of_chunk = chunk;
  }
  write_tile(a, sequence, 0, tokens, joined, of_chunk, 0, 0);
}

// Gives every warp the maps of all chunks of the block's tile: lane c gets that of chunk c. The caller must not write
// `shared` again before the next barrier.
__device__ __forceinline__ Affine share_chunks(const Affine (&joined)[kChunks], Affine* shared) {
  if (lane_index() == 0) {
#pragma unroll
    for (int k = 0; k < kChunks; k++) shared[warp_index() * kChunks + k] = joined[k];
  }
  __syncthreads();
  return lane_index() < warps_of_block() * kChunks ? shared[lane_index()] : Affine{1, 0};
}

// The tile of a block, where blocks share a sequence.
struct Tile {
  Sequence sequence;
  int64_t at, count;  // its number, and the number of tiles of the sequence

  __device__ __forceinline__ bool exists() const { return at >= 0 && at < count; }  // else the block has no work
};

// Packed sequence i has the blocks from this number on, at least as many as it has tiles, whatever its length.
__device__ __forceinline__ int64_t first_block_of(const Gae& a, int64_t i) {
  return sequence_of(a, i).start / kSpanOfBlock + i;
}

inline int64_t blocks_of_tiles(const Gae& a) {
  return a.cu_seqlens ? a.length / kSpanOfBlock + a.sequences : a.sequences * ceil_div(a.length, kSpanOfBlock);
}

// The packed sequence of a block: the last whose blocks begin there or before. The lanes of a warp compare 32 sequences
// at a time, so that few loads wait for each other.
__device__ __forceinline__ int64_t packed_sequence_of(const Gae& a, int64_t block) {
  int64_t first = 0, count = a.sequences;
  while (count > 1) {
    const int64_t step = ceil_div(count, kWarp), i = first + lane_index() * step;
    const bool begun = i < first + count && first_block_of(a, i) <= block;
    const int64_t last = larger(__popc(__ballot_sync(kAllLanes, begun)), 1) - 1;
    first += last * step;
    count = smaller(step, count - last * step);
  }
  return first;
}

__device__ __forceinline__ Tile tile_of_block(const Gae& a) {
  const int64_t block = blockIdx.x, tiles = ceil_div(a.length, kSpanOfBlock);
  const int64_t i = a.cu_seqlens ? packed_sequence_of(a, block) : block / tiles;
  const Sequence sequence = sequence_of(a, i);
  return {sequence, block - (a.cu_seqlens ? first_block_of(a, i) : i * tiles), ceil_div(sequence.size, kSpanOfBlock)};
}

constexpr int kChecked = 8 * kWarp;  // sequences whose bounds a warp checks

inline int64_t checks_of(const Gae& a) { return a.cu_seqlens ? ceil_div(a.sequences, kChecked) : 0; }

// Writes whether the bounds of a block's sequences are wrong; the first blocks have some. The sweep reads all of it.
__device__ __forceinline__ void check_bounds(const Gae& a, bool* wrong) {
  const int64_t first = (int64_t)blockIdx.x * kChecked;
  if (first >= a.sequences || warp_index() > 0) return;
  bool found = false;
#pragma unroll
  for (int k = 0; k < kChecked; k += kWarp) {
    const int64_t i = smaller(first + k + lane_index(), a.sequences - 1), start = a.cu_seqlens[i];
    const int64_t stop = a.cu_seqlens[i + 1];
    found |= start > stop || (i == 0 && start != 0) || (i == a.sequences - 1 && stop != a.length);
  }
  found = __any_sync(kAllLanes, found);
  if (lane_index() == 0) wrong[blockIdx.x] = found;
}

// Whether any bound is wrong. All lanes of a warp must call this.
__device__ __forceinline__ bool any_wrong(const Gae& a, const bool* wrong) {
  bool found = false;
  for (int64_t i = lane_index(); i < ceil_div(a.sequences, kChecked); i += kWarp) found |= wrong[i];
  return __any_sync(kAllLanes, found);
}

// Writes the map of each tile, one block per tile. No block needs that of a first tile.
__global__ void __launch_bounds__(kMostThreads) measure_tiles(Gae a, Rates rates, Affine* of_tile, bool* wrong) {
  __shared__ Affine shared[kWarp];
  if (a.cu_seqlens) check_bounds(a, wrong);
  const Tile tile = tile_of_block(a);
  if (!tile.exists() || tile.at == 0) return;
  const Tokens tokens(a, tile.sequence, tile.at * kSpanOfBlock + warp_index() * kSpan);
  Affine joined[kChunks];
  scan_chunks(tokens, rates, joined);
  const Affine map = scan_from_end(share_chunks(joined, shared));
  if (threadIdx.x == 0) of_tile[blockIdx.x] = map;
}

// For wrong cu_seqlens.
__device__ void write_nan(const Gae& a, int64_t start, int64_t stop) {
  for (int64_t i = start + threadIdx.x; i < stop; i += blockDim.x) a.advantages[i] = a.returns[i] = NAN;
}

// g after the tile of the block, from the maps of the later tiles. Each thread loads one map; then every thread applies
// all of them in sequence, as a block with the whole sequence does.
__device__ __forceinline__ float carry_into(const Tile& tile, const Affine* of_tile) {
  __shared__ Affine shared[kMostThreads];
  const Affine* of_sequence = of_tile + (blockIdx.x - tile.at);
  float carry = 0;
  for (int64_t stop = tile.count; stop > tile.at + 1; stop -= kMostThreads) {
    const int64_t start = larger(stop - kMostThreads, tile.at + 1);
    __syncthreads();
    if (threadIdx.x < stop - start) shared[threadIdx.x] = of_sequence[start + threadIdx.x];
    __syncthreads();
    for (int64_t i = stop - start - 1; i >= 0; i--) carry = apply(shared[i], carry);
  }
  return carry;
}

// Writes the results, one block per tile, from the maps of all tiles.
__global__ void __launch_bounds__(kMostThreads)
    sweep_tiles(Gae a, Rates rates, const Affine* of_tile, const bool* wrong) {
  __shared__ Affine shared[kWarp];
  if (a.cu_seqlens && any_wrong(a, wrong)) {
    const int64_t start = (int64_t)blockIdx.x * kSpanOfBlock;
    return write_nan(a, start, smaller(start + kSpanOfBlock, a.length));
  }
  const Tile tile = tile_of_block(a);
  if (!tile.exists()) return;
  const int64_t first = tile.at * kSpanOfBlock + warp_index() * kSpan;
  const Tokens tokens(a, tile.sequence, first);  // loads start before the barriers of carry_into
  const float carry = carry_into(tile, of_tile);
  Affine joined[kChunks];
  scan_chunks(tokens, rates, joined);
  const Affine of_chunk = share_chunks(joined, shared);
  write_tile(a, tile.sequence, first, tokens, joined, of_chunk, warp_index() * kChunks, carry);
}

// Writes the results, one block per padded sequence.
__global__ void __launch_bounds__(kMostThreads) sweep(Gae a, Rates rates) {
  // Double buffer: a warp may write the next tile's maps while another still reads these, so one barrier per tile is
  // enough.
  __shared__ Affine shared[2][kWarp];
  const Sequence sequence = sequence_of(a, blockIdx.x);
  const int64_t tiles = ceil_div(sequence.size, kSpanOfBlock), own = warp_index() * kSpan;
  Tokens next(a, sequence, (tiles - 1) * kSpanOfBlock + own);
  float carry = 0;
  for (int64_t tile = tiles - 1; tile >= 0; tile--) {
    const Tokens tokens = next;
    if (tile > 0) next = Tokens(a, sequence, (tile - 1) * kSpanOfBlock + own);  // prefetch
    Affine joined[kChunks];
    scan_chunks(tokens, rates, joined);
    const Affine of_chunk = share_chunks(joined, shared[tile % 2]);
    carry = write_tile(a, sequence, tile * kSpanOfBlock + own, tokens, joined, of_chunk, warp_index() * kChunks, carry);
  }
}

__global__ void __launch_bounds__(kMostThreads) without_sequences(Gae a) { write_nan(a, 0, a.length); }

const char* run(const Gae& a, Affine* of_tile, void* stream) {
  const double gamma_lam = a.gamma * a.lam;
  const Rates rates = {(float)gamma_lam, (float)(a.gamma - gamma_lam)};
  if (!a.cu_seqlens && a.length <= kSpan) {
    constexpr int kWarps = kMostThreads / kWarp;
    return launch(sweep_short, ceil_div(a.sequences, kWarps), kMostThreads, 0, stream, a, rates);
  }
  if (a.sequences == 0) return launch(without_sequences, 1, kMostThreads, 0, stream, a);  // wrong cu_seqlens
  if (of_tile) {
    const int64_t blocks = blocks_of_tiles(a);
    bool* wrong = (bool*)(of_tile + blocks);
    const char* error = launch(measure_tiles, blocks, kMostThreads, 0, stream, a, rates, of_tile, wrong);
    return error ? error : launch(sweep_tiles, blocks, kMostThreads, 0, stream, a, rates, of_tile, wrong);
  }
  const int threads = (int)ceil_div(smaller(a.length, (int64_t)kSpanOfBlock), kSpan) * kWarp;
  return launch(sweep, a.sequences, threads, 0, stream, a, rates);
}

}  // namespace

const char* gae(const Gae& a, Scratch& scratch, void* stream) {
  const int64_t tokens = a.cu_seqlens ? a.length : a.sequences * a.length;
  if (tokens == 0) return nullptr;
  const bool split = a.cu_seqlens || (a.length > kSpanOfBlock && a.sequences < kFillsGpu);
  // The whitening runs after the last read of the maps, so it reuses their memory.
  constexpr size_t kStatistics = 32;
  scratch.needed = larger(split ? blocks_of_tiles(a) * sizeof(Affine) + checks_of(a) : 0,
                          a.whiten ? kStatistics + masked_whiten_scratch(tokens) : 0);
  if (scratch.size < scratch.needed) return nullptr;
  const char* error = run(a, split ? (Affine*)scratch.data : nullptr, stream);
  if (error || !a.whiten) return error;
  Scratch rest{(char*)scratch.data + kStatistics, scratch.size - kStatistics, 0, scratch.ticket};
  return masked_whiten({tokens, a.advantages, a.live, true, true, false, (double*)scratch.data, a.advantages}, rest,
                       stream);
}

}  // namespace rlhf_fast::cuda
