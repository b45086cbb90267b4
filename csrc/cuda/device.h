// Shared by all kernels: launches, reductions in a fixed order, and the last block of a launch.
#pragma once

#include <cstring>

#include "scalar.h"

namespace rlhf_fast::cuda {

constexpr int kWarp = 32;
constexpr int kSumWarps = 8;  // warps of a block that calls block_sum or block_max
constexpr unsigned kAllLanes = 0xffffffff;

inline const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error; otherwise the next user of CUDA, such as torch, would report it
  return cudaGetErrorString(error);
}

// Launches kernel(arguments...) on `blocks` blocks. Does nothing for 0 blocks, which CUDA would reject.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return cudaGetErrorString(cudaErrorInvalidConfiguration);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = (cudaStream_t)stream;
  return text(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

RLHF_FAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Reserves `count` elements of the scratch. The pointer is valid only if scratch.size >= scratch.needed.
template <class T>
T* take(Scratch& scratch, int64_t count) {
  T* part = (T*)((char*)scratch.data + scratch.needed);
  scratch.needed += ceil_div(count * sizeof(T), 16) * 16;
  return part;
}

template <class T>
RLHF_FAST_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
RLHF_FAST_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int warps_of_block() { return blockDim.x / kWarp; }

// Whether `data` is aligned so that a T can be loaded or stored by one instruction.
template <class T>
__device__ __forceinline__ bool is_aligned(const void* data) {
  return (uintptr_t)data % sizeof(T) == 0;
}

// ---- reductions over a warp and over a block: every thread must call them --------------------------------------------

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// NaN is ignored.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = larger(__shfl_xor_sync(kAllLanes, x, step), x);
  return x;
}

// Sums N numbers per thread over the block; every thread gets the results. The order within a warp and over the warps
// is fixed, so every run gives the same bits.
template <class T, int N>
__device__ __forceinline__ void block_sum(T (&x)[N]) {
  __shared__ T sums[N][kSumWarps];
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
  __syncthreads();  // all threads have read `sums` of the previous call
  if (lane_index() == 0) {
#pragma unroll
    for (int i = 0; i < N; i++) sums[i][warp_index()] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    x[i] = sums[i][0];
#pragma unroll
    for (int warp = 1; warp < kSumWarps; warp++) x[i] += sums[i][warp];
  }
}

__device__ __forceinline__ float block_max(float x) {
  __shared__ float largest[kSumWarps];
  x = warp_max(x);
  __syncthreads();
  if (lane_index() == 0) largest[warp_index()] = x;
  __syncthreads();
  float found = largest[0];
#pragma unroll
  for (int warp = 1; warp < kSumWarps; warp++) found = larger(largest[warp], found);
  return found;
}

// ---- parts of a result, one per block, added by the last block of the launch -----------------------------------------

// Whether this block is the last of the launch to call this. If so, it sees the stores of all other blocks, if it reads
// them with __ldcg. `ticket` is 0 before the launch, and after it too: atomicInc wraps to 0 at the last block. Which
// block is last differs from run to run, so it decides only which block adds the parts, never a result.
__device__ __forceinline__ bool is_last(unsigned* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // makes the stores of the whole block visible; the barrier ordered them before this
    last = gridDim.x == 1 || atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // orders the last block's loads after all other blocks' stores
  }
  __syncthreads();
  return last;
}

// __ldcg bypasses the L1 cache, which is not coherent with the stores of other blocks.
template <class Part>
__device__ __forceinline__ Part load_part(const Part* part) {
  static_assert(alignof(Part) == 16, "a part is read 16 bytes at a time");
  uint4 words[sizeof(Part) / 16];
#pragma unroll
  for (int k = 0; k < (int)(sizeof(Part) / 16); k++) words[k] = __ldcg((const uint4*)part + k);
  Part found;
  memcpy(&found, words, sizeof(Part));
  return found;
}

}  // namespace rlhf_fast::cuda
