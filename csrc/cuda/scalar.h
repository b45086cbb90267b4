// formulas.h for F = float, one token per thread, and the functions that it needs. csrc/cpu/vec.h has them for vectors.
#pragma once

#include <cuda_runtime.h>

#include "../rlhf_fast.h"

namespace rlhf_fast::cuda {

#define RLHF_FAST_INLINE __host__ __device__ __forceinline__

template <class T>
RLHF_FAST_INLINE T where(bool condition, T a, T b) {
  return condition ? a : b;
}
RLHF_FAST_INLINE float abs(float x) { return ::fabsf(x); }
RLHF_FAST_INLINE float expm1(float x) { return ::expm1f(x); }
RLHF_FAST_INLINE float bounded_exp(float x) { return ::expf(x > 87.0f ? 87.0f : x); }
RLHF_FAST_INLINE float reciprocal(float x) { return 1 / x; }

#include "../formulas.h"

}  // namespace rlhf_fast::cuda
