// A square of vectors, whose rows become columns.
#pragma once

#include "vec.h"

namespace rlhf_fast::RLHF_FAST_PATH {

#if defined(__AVX512F__)
#define RLHF_FAST_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define RLHF_FAST_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define RLHF_FAST_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define RLHF_FAST_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define RLHF_FAST_LOW 0, 4, 1, 5
#define RLHF_FAST_HIGH 2, 6, 3, 7
#endif

// Interleaving the first half of the vectors with the second rotates the bits of the index (vector, lane) by one place.
// After log2(kLanes) rotations vector and lane have changed places.
template <class Vector>
RLHF_FAST_INLINE void transpose(Vector (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int turn = 1; turn < kLanes; turn *= 2) {
    Vector turned[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      turned[2 * i] = __builtin_shufflevector(x[i], x[i + kLanes / 2], RLHF_FAST_LOW);
      turned[2 * i + 1] = __builtin_shufflevector(x[i], x[i + kLanes / 2], RLHF_FAST_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) x[i] = turned[i];
  }
}

#undef RLHF_FAST_LOW
#undef RLHF_FAST_HIGH

}  // namespace rlhf_fast::RLHF_FAST_PATH
