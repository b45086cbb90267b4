// Loads and stores of rows of hidden states. A thread takes kVector<T> consecutive columns, by one instruction where
// all of them exist and are aligned. The assignment of columns to threads does not depend on the row's address.
#pragma once

#include "rows.h"

namespace rlhf_fast::cuda {

template <class T>
__device__ __forceinline__ T* row_of(const Hidden& hidden, int64_t row) {
  return (T*)hidden.data + row * hidden.row_stride;
}

__device__ __forceinline__ float load(const float* from) { return *from; }
__device__ __forceinline__ float load(const BFloat16* from) { return float_of((uint32_t)from->bits << 16); }
__device__ __forceinline__ float load(const Float16* from) { return widened(*from); }

// The numbers of a thread, as floats.
template <int kCount>
struct Numbers {
  float at[kCount];
};

// Loads kCount numbers from each of N addresses, of which only the first `left` exist; the others are 0. Where all
// addresses are aligned, all loads are issued before the first use of a result, so that they are in flight together.
template <int kCount, int N, class T>
__device__ __forceinline__ void load_numbers(Numbers<kCount> (&x)[N], const T* const (&from)[N], int64_t left) {
  static_assert(kCount % kVector<T> == 0);
  constexpr int kLoads = kCount / kVector<T>;
  uintptr_t addresses = 0;
#pragma unroll
  for (int n = 0; n < N; n++) addresses |= (uintptr_t)from[n];
  if (left >= kCount && addresses % sizeof(uint4) == 0) {
    uint4 words[N][kLoads];
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int k = 0; k < kLoads; k++) words[n][k] = ((const uint4*)from[n])[k];
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int k = 0; k < kLoads; k++) {
        const uint4& bytes = words[n][k];
        unpack(T{}, Bytes16{{bytes.x, bytes.y, bytes.z, bytes.w}}, x[n].at + k * kVector<T>);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int k = 0; k < kCount; k++) x[n].at[k] = k < left ? load(from[n] + k) : 0;
    }
  }
}

template <int kCount, class T>
__device__ __forceinline__ Numbers<kCount> load_numbers(const T* from, int64_t left) {
  Numbers<kCount> x[1];
  load_numbers(x, {from}, left);
  return x[0];
}

template <class T, int kCount>
__device__ __forceinline__ void store_numbers(T* to, const Numbers<kCount>& x, int64_t left) {
  static_assert(kCount == kVector<T>);
  if (left >= kCount && is_aligned<uint4>(to)) {
    store_vector<kCount>(to, x.at);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      if (k < left) store(to + k, x.at[k]);
    }
  }
}

// Columns that a block takes at a time.
template <class T>
constexpr int kStep = kThreads * kVector<T>;

}  // namespace rlhf_fast::cuda
