// bfloat16 and float16 as 16 bits, and the PTX instructions of the row kernels. For the host and the tests' emulator
// the same functions are in plain C++.
#pragma once

#include "device.h"

namespace rlhf_fast::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#ifdef __CUDA_ARCH__

// 2^x to 2 ulp, and 0 instead of a subnormal number. One instruction; exp2f takes several.
RLHF_FAST_INLINE float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Hides from the compiler how x was computed. No instruction.
RLHF_FAST_INLINE void make_opaque(float& x) { asm volatile("" : "+f"(x)); }

RLHF_FAST_INLINE float widened(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two numbers rounded to nearest, ties to even; `low` is in the low half.
RLHF_FAST_INLINE uint32_t packed(BFloat16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
RLHF_FAST_INLINE uint32_t packed(Float16, float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#else

RLHF_FAST_INLINE float exp2_flushed(float x) { return x < -126 ? 0 : exp2f(x); }

RLHF_FAST_INLINE void make_opaque(float&) {}

RLHF_FAST_INLINE float widened(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fff, sign = (uint32_t)(x.bits & 0x8000) << 16;
  const float scaled = float_of(magnitude << 13) * 0x1p112f;  // the difference of the exponent biases
  return float_of(sign | (magnitude < 0x7c00 ? bits_of(scaled) : magnitude << 13 | 0x7f800000));
}

RLHF_FAST_INLINE uint32_t rounded(BFloat16, float x) {
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}
RLHF_FAST_INLINE uint32_t rounded(Float16, float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (!(magnitude < 65520.0f)) return sign | (x == x ? 0x7c00 : 0x7e00);
  // subnormal halves are multiples of 2^-24, the last bit of 0.5f, so adding 0.5f rounds to one
  if (magnitude < 0x1p-14f) return sign | (bits_of(magnitude + 0.5f) - bits_of(0.5f));
  const uint32_t rest = bits_of(magnitude) - (112u << 23);
  return sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13;
}
template <class Half>
RLHF_FAST_INLINE uint32_t packed(Half kind, float low, float high) {
  return rounded(kind, low) | rounded(kind, high) << 16;
}

#endif

// ---- 16 bytes, the widest load and store ----------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

__device__ __forceinline__ void unpack(float, const Bytes16& bytes, float* x) {
#pragma unroll
  for (int k = 0; k < 4; k++) x[k] = float_of(bytes.word[k]);
}
__device__ __forceinline__ void unpack(BFloat16, const Bytes16& bytes, float* x) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    x[2 * k] = float_of(bytes.word[k] << 16);
    x[2 * k + 1] = float_of(bytes.word[k] & 0xffff0000);
  }
}
__device__ __forceinline__ void unpack(Float16, const Bytes16& bytes, float* x) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    x[2 * k] = widened(Float16{(uint16_t)bytes.word[k]});
    x[2 * k + 1] = widened(Float16{(uint16_t)(bytes.word[k] >> 16)});
  }
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
template <class Half>
__device__ __forceinline__ void store(Half* to, float x) {
  to->bits = (uint16_t)packed(Half{}, x, 0);
}

// Stores kCount consecutive numbers, 8 or 16 aligned bytes. __stcg, because the data is not read again through L1.
template <int kCount>
__device__ __forceinline__ void store_vector(float* to, const float* x) {
  static_assert(kCount == 4);
  __stcg((float4*)to, make_float4(x[0], x[1], x[2], x[3]));
}
template <int kCount, class Half>
__device__ __forceinline__ void store_vector(Half* to, const float* x) {
  if constexpr (kCount == 4) {
    __stcg((uint2*)to, make_uint2(packed(Half{}, x[0], x[1]), packed(Half{}, x[2], x[3])));
  } else {
    static_assert(kCount == 8);
    __stcg((uint4*)to, make_uint4(packed(Half{}, x[0], x[1]), packed(Half{}, x[2], x[3]), packed(Half{}, x[4], x[5]),
                                  packed(Half{}, x[6], x[7])));
  }
}

}  // namespace rlhf_fast::cuda
