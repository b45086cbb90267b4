// A vector of floats for every instruction set, in the vector extensions of GCC and Clang. The AVX-512, AVX2 and
// portable paths are the same source, compiled three times into three namespaces (RLHF_FAST_PATH).
//
// This folder uses no templates of std:: that may be emitted as functions. The linker keeps only one copy of such a
// function, and that could be the one compiled with AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../rlhf_fast.h"

namespace rlhf_fast::RLHF_FAST_PATH {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t U8 __attribute__((vector_size(kLanes)));

#define RLHF_FAST_INLINE inline __attribute__((always_inline))

RLHF_FAST_INLINE F32 all(float x) { return x - F32{}; }  // not x + 0: that differs at -0, so it compiles to an addition
RLHF_FAST_INLINE F32 where(I32 condition, F32 a, F32 b) { return condition ? a : b; }
RLHF_FAST_INLINE F32 as_float(I32 bits) { return (F32)bits; }
RLHF_FAST_INLINE I32 as_bits(F32 x) { return (I32)x; }
RLHF_FAST_INLINE F32 abs(F32 x) { return as_float(as_bits(x) & 0x7fffffff); }
// By intrinsics, because GCC 12 emits two instructions for x < bound ? bound : x. A NaN in `x` is kept.
#if defined(__AVX512F__)
RLHF_FAST_INLINE F32 at_least(F32 x, F32 bound) { return (F32)_mm512_maskz_max_ps(0xffff, (__m512)bound, (__m512)x); }
RLHF_FAST_INLINE F32 at_most(F32 x, F32 bound) { return (F32)_mm512_maskz_min_ps(0xffff, (__m512)bound, (__m512)x); }
#elif defined(__AVX2__)
RLHF_FAST_INLINE F32 at_least(F32 x, F32 bound) { return (F32)_mm256_max_ps((__m256)bound, (__m256)x); }
RLHF_FAST_INLINE F32 at_most(F32 x, F32 bound) { return (F32)_mm256_min_ps((__m256)bound, (__m256)x); }
#else
RLHF_FAST_INLINE F32 at_least(F32 x, F32 bound) { return x < bound ? bound : x; }
RLHF_FAST_INLINE F32 at_most(F32 x, F32 bound) { return x > bound ? bound : x; }
#endif
// max(x, kept): a NaN in `kept` is kept, a NaN in `x` is ignored.
RLHF_FAST_INLINE F32 larger(F32 x, F32 kept) { return x > kept ? x : kept; }

RLHF_FAST_INLINE F32 half_power(F32 shifted) { return (F32)(((U32)shifted << 23) + (126u << 23)); }

RLHF_FAST_INLINE F32 bounded_exp(F32 x);
RLHF_FAST_INLINE F32 reciprocal(F32 x);

#include "../formulas.h"

// 2^(x * rate) for x * rate <= 126 (or NaN) and rate >= 2^-119, with a relative error of 2e-7; exactly 0 below 2^-125.
//
// The loops over the vocabulary spend most of their time here, so this is the shortest sequence for that error. The
// bound is applied to x, not to x * rate: the product then occurs only in fused multiply-adds, which do not round it.
RLHF_FAST_INLINE F32 exp2_scaled(F32 x, float rate) {
  const float lowest = -126.0f / rate;  // loop-invariant: the compiler hoists it
  x = at_least(x, all(lowest));
  const F32 shifted = x * rate + kRounder;
  const F32 f = x * rate - (shifted - kRounder);
  // 2 p(f) * 2^(n - 1) instead of p(f) * 2^n: at n = -126 the power, and so the result, is 0 without a comparison
  F32 p = all(2.6529454e-3f);
  p = p * f + 1.9343026e-2f;
  p = p * f + 1.11014672e-1f;
  p = p * f + 4.8044484e-1f;
  p = p * f + 1.3862940f;
  p = p * f + 2.0f;
  return p * half_power(shifted);
}

RLHF_FAST_INLINE F32 exp(F32 x) { return split_exponential(at_most(x, all(kOverflow))).value(); }

// min(e^x, e^87) with a relative error of 2e-7; exactly 0 below 2^-125.
RLHF_FAST_INLINE F32 bounded_exp(F32 x) { return exp2_scaled(at_most(x, all(87.0f)), kLog2E); }

// 1 / x to 1 or 2 ulp, for 1 <= x < 2^126. Avoids the division of AVX-512, one in 16 cycles.
RLHF_FAST_INLINE F32 reciprocal(F32 x) {
#ifdef __AVX512F__
  const F32 near = (F32)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return near + near * (1.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// (e^2x - 1) / (e^2x + 1). For |x| > 10 it rounds to +-1.
RLHF_FAST_INLINE F32 tanh(F32 x) {
  const F32 bounded = x > 10.0f ? all(10.0f) : (x < -10.0f ? all(-10.0f) : x);
  const F32 e = split_exponential(bounded + bounded).minus_1();
  return e / (e + 2.0f);
}

// Reduces the lanes: repeatedly combines the upper half with the lower half. Written out so that the order of a sum
// does not depend on the compiler.
template <class Combine>
RLHF_FAST_INLINE float across(F32 x, const Combine& combine) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter parts[kLanes / 4];
  memcpy(parts, &x, sizeof(x));
  for (int half = kLanes / 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) parts[i] = combine(parts[i], parts[i + half]);
  }
  const Quarter last = parts[0];
  return combine(combine(last[0], last[2]), combine(last[1], last[3]));
}

RLHF_FAST_INLINE float sum(F32 x) {
  return across(x, [](auto a, auto b) { return a + b; });
}

RLHF_FAST_INLINE float largest(F32 x) {
  return across(x, [](auto a, auto b) { return b > a ? b : a; });
}

// ---- loads and stores: any alignment, float32 or a 16-bit type, whole vectors or the first `count` lanes ------------

template <class Vector, class Element>
RLHF_FAST_INLINE Vector load_raw(const Element* from, int count) {
  Vector x{};
  if (count >= (int)(sizeof(Vector) / sizeof(Element))) {
    memcpy(&x, from, sizeof(Vector));
  } else {
    memcpy(&x, from, count * sizeof(Element));
  }
  return x;
}

template <class Vector, class Element>
RLHF_FAST_INLINE void store_raw(Element* to, Vector x, int count) {
  if (count >= (int)(sizeof(Vector) / sizeof(Element))) {
    memcpy(to, &x, sizeof(Vector));
  } else {
    memcpy(to, &x, count * sizeof(Element));
  }
}

// Zero-extends each element to 32 bits. By intrinsics, because GCC 12 emits six instructions otherwise.
RLHF_FAST_INLINE U32 widened(U16 x) {
#if defined(__AVX512F__)
  return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);  // without a mask, GCC 12 warns about its own header
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, U32);
#endif
}

RLHF_FAST_INLINE U32 widened(U8 x) {
#if defined(__AVX512F__)
  return (U32)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)x);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&x));
#else
  return __builtin_convertvector(x, U32);
#endif
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Lanes from `count` on are 0.
RLHF_FAST_INLINE F32 load(const float* from, int count = kLanes) { return load_raw<F32>(from, count); }

RLHF_FAST_INLINE F32 load(const BFloat16* from, int count = kLanes) {
  return (F32)(widened(load_raw<U16>(from, count)) << 16);
}

RLHF_FAST_INLINE F32 load(const Float16* from, int count = kLanes) {
  // Multiplying by 2^112, for the difference of the exponent biases, also normalises subnormal halves. Infinity and NaN
  // need an exponent of all ones instead.
  const U32 half = widened(load_raw<U16>(from, count));
  const U32 magnitude = (half & 0x7fff) << 13;
  const F32 finite = (F32)magnitude * 5.192296858534828e33f;  // 2^112
  const F32 special = (F32)(magnitude | 0x7f800000);
  const F32 unsigned_value = (I32)magnitude >= 0x0f800000 ? special : finite;
  return (F32)((U32)unsigned_value | ((half & 0x8000) << 16));
}

RLHF_FAST_INLINE void store(float* to, F32 x, int count = kLanes) { store_raw(to, x, count); }

// Rounds to nearest, ties to even: adding 0x7fff plus the last kept bit carries into the kept bits exactly when
// rounding up. NaN is a special case, because the carry could turn it into infinity.
RLHF_FAST_INLINE void store(BFloat16* to, F32 x, int count = kLanes) {
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 result = (U32)(x == x ? (I32)rounded : (I32)(U32{} + 0x7fc0));
  store_raw(to, __builtin_convertvector(result, U16), count);
}

RLHF_FAST_INLINE void store(Float16* to, F32 x, int count = kLanes) {
  // Computes all cases and selects per lane.
  const U32 sign = ((U32)x >> 16) & 0x8000;
  const U32 bits = (U32)x & 0x7fffffff;
  // subnormal halves are multiples of 2^-24, the last bit of 0.5f, so adding 0.5f rounds to one
  const U32 small = (U32)((F32)bits + 0.5f) - 0x3f000000;
  const U32 normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  const U32 over = (U32)((I32)bits > 0x7f800000 ? (I32)(U32{} + 0x7e00) : (I32)(U32{} + 0x7c00));
  U32 result = (U32)((I32)bits < 0x38800000 ? (I32)small : (I32)normal);
  result = (U32)((I32)bits >= 0x47800000 ? (I32)over : (I32)result);
  store_raw(to, __builtin_convertvector(result | sign, U16), count);
}

// All bits of a lane are set where the byte is not 0.
RLHF_FAST_INLINE I32 load_mask(const uint8_t* from, int count = kLanes) {
  return widened(load_raw<U8>(from, count)) != 0;
}

// All bits of the first `count` lanes are set.
RLHF_FAST_INLINE I32 first_lanes(int count) {
  I32 lane{};
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane < count;
}

template <class Pointer>
struct Pointed;
template <class T>
struct Pointed<T*> {
  using type = T;
};

// Calls `body` with the pointer cast to the type that `dtype` names.
template <class Body>
RLHF_FAST_INLINE void typed(void* data, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body((float*)data);
    case DType::bf16: return body((BFloat16*)data);
    default: return body((Float16*)data);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
