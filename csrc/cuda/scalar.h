// formulas.h for F = float, one token per thread, and the functions that it needs. csrc/cpu/vec.h has them for vectors.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "../rlhf_fast.h"

namespace rlhf_fast::cuda {

#define RLHF_FAST_INLINE __host__ __device__ __forceinline__

// The float with these 32 bits, and back.
RLHF_FAST_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
RLHF_FAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}

template <class T>
RLHF_FAST_INLINE T where(bool condition, T a, T b) {
  return condition ? a : b;
}
RLHF_FAST_INLINE float abs(float x) { return ::fabsf(x); }
RLHF_FAST_INLINE float at_least(float x, float bound) { return x < bound ? bound : x; }
RLHF_FAST_INLINE float at_most(float x, float bound) { return x > bound ? bound : x; }
RLHF_FAST_INLINE float half_power(float shifted) { return float_of((bits_of(shifted) << 23) + (126u << 23)); }
RLHF_FAST_INLINE float bounded_exp(float x) { return ::expf(x > 87.0f ? 87.0f : x); }
RLHF_FAST_INLINE float reciprocal(float x) { return 1 / x; }

#include "../formulas.h"

}  // namespace rlhf_fast::cuda
