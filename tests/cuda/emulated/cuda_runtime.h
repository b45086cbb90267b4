// CUDA for the CPU: as much of cuda_runtime.h as csrc/cuda uses, so that a C++ compiler compiles the kernels and they
// run here, block after block, each thread of a block a fiber that gives way at barriers and shuffles.
//
// What CUDA leaves undefined is an error that says where: threads at different barriers, a lane read that has nothing
// to give, a misaligned access. It comes back as the text of the launch's error. Blocks take turns at running their
// threads from the first and from the last, so that a missing barrier shows.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ thread_local  // that of a function is static, and may be declared extern
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define EMULATED_VECTORS(type, scalar)                                 \
  struct alignas(2 * sizeof(scalar)) type##2 { scalar x, y; };         \
  struct alignas(4 * sizeof(scalar)) type##4 { scalar x, y, z, w; };   \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; } \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(uint, unsigned)
EMULATED_VECTORS(int, int)
#undef EMULATED_VECTORS
struct alignas(16) double2 {
  double x, y;
};

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// Where in the kernels' source.
struct Place {
  const char* file;
  int line;
};
#define EMULATED_HERE emulated::Place here = {__builtin_FILE(), __builtin_LINE()}

// Ends the launch with this error; `what` is printf's.
[[noreturn]] void fail(Place, const char* what, ...);
void block_barrier(Place);
// Gives `bytes` of this lane to the others of `mask` and waits until they have come; `lane_value` reads one's.
void warp_barrier(Place, unsigned mask, const void* value, size_t bytes);
const void* lane_value(Place, unsigned mask, int lane);
// nullptr or what went wrong.
const char* run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

template <class T>
void check_aligned(const T* data, Place place) {
  if ((uintptr_t)data % alignof(T) == 0) return;
  fail(place, "an access of %zu bytes to the address %p", sizeof(T), (const void*)data);
}

template <class T>
T exchange(Place place, unsigned mask, T value, int from) {
  warp_barrier(place, mask, &value, sizeof(T));
  memcpy(&value, lane_value(place, mask, from), sizeof(T));
  return value;
}

inline int own_lane() { return threadIdx.x % 32; }

}  // namespace emulated

inline void __syncthreads(EMULATED_HERE) { emulated::block_barrier(here); }
inline void __syncwarp(unsigned mask = ~0u, EMULATED_HERE) { emulated::warp_barrier(here, mask, nullptr, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATED_HERE) {
  const int own = emulated::own_lane();
  return emulated::exchange(here, mask, value, own / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATED_HERE) {
  const int own = emulated::own_lane(), from = own ^ bits;
  return emulated::exchange(here, mask, value, from / width == own / width ? from : own);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32, EMULATED_HERE) {
  const int own = emulated::own_lane(), from = own + (int)step;
  return emulated::exchange(here, mask, value, from / width == own / width ? from : own);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32, EMULATED_HERE) {
  const int own = emulated::own_lane(), from = own - (int)step;
  return emulated::exchange(here, mask, value, from >= own / width * width ? from : own);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_HERE) {
  emulated::warp_barrier(here, mask, &predicate, sizeof(predicate));
  unsigned found = 0;
  for (int lane = 0; lane < 32; lane++) {
    if (mask >> lane & 1 && *(const int*)emulated::lane_value(here, mask, lane)) found |= 1u << lane;
  }
  return found;
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_HERE) { return __ballot_sync(mask, predicate, here) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMULATED_HERE) {
  return __ballot_sync(mask, predicate, here) == mask;
}

#define EMULATED_LOAD(name)              \
  template <class T>                     \
  T name(const T* from, EMULATED_HERE) { \
    emulated::check_aligned(from, here); \
    return *from;                        \
  }
#define EMULATED_STORE(name)                 \
  template <class T>                         \
  void name(T* to, T value, EMULATED_HERE) { \
    emulated::check_aligned(to, here);       \
    *to = value;                             \
  }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldca)
EMULATED_LOAD(__ldcg)
EMULATED_LOAD(__ldcs)
EMULATED_STORE(__stcg)
EMULATED_STORE(__stcs)
#undef EMULATED_LOAD
#undef EMULATED_STORE

inline unsigned atomicInc(unsigned* to, unsigned last) {
  const unsigned before = *to;
  *to = before >= last ? 0 : before + 1;
  return before;
}

template <class To, class From>
To emulated_bits(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

// ---- the runtime -----------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

cudaError_t emulated_launch(const cudaLaunchConfig_t&, const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulated_launch(*config, [&] { kernel(arguments...); });
}
