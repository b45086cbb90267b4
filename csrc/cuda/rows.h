// Loads and stores of rows of logits. A block holds a segment of a row's columns in registers, read by 16-byte loads.
//
// The assignment of columns to threads does not depend on the address of the row, so a sum does not either. A row of
// 50257 bfloat16 columns may start at any even address. A thread's 16 bytes then span two aligned groups of 16 bytes.
// The thread loads both, the second mostly from L1 because the next thread loads it too, and shifts the bytes together.
#pragma once

#include "halves.h"

namespace rlhf_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Columns of a thread. Enough loads are in flight to hide the memory latency (8 of float32, 4 of a 16-bit type), and 32
// registers leave room for 3 or 4 blocks per multiprocessor.
constexpr int kColumns = 32;
constexpr int kSegment = kThreads * kColumns;  // columns of a block

// Columns in a load of 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

struct RowSegment {
  int64_t row;
  int segment;
};

// The row and segment of this block. Consecutive blocks read consecutive segments. A 64-bit division would be slow.
__device__ __forceinline__ RowSegment segment_of_block(int segments) {
  const unsigned row = blockIdx.x / (unsigned)segments;
  return {row, (int)(blockIdx.x - row * segments)};
}

// The column of this thread's x[i] in the segment at `start`. In each step a warp reads 512 consecutive bytes.
template <class T>
__device__ __forceinline__ int column_of(int start, int i) {
  constexpr int kWidth = kVector<T>;
  return start + i / kWidth * (kThreads * kWidth) + (int)threadIdx.x * kWidth + i % kWidth;
}

// The 16 bytes at `offset` in the 32 bytes of `low` and `high`. Shifts by 8 bytes, by 4, then by less, because an index
// known only at run time would put `word` into local memory.
__device__ __forceinline__ Bytes16 shifted(const Bytes16& low, const Bytes16& high, unsigned offset) {
  uint32_t word[8];
#pragma unroll
  for (int k = 0; k < 4; k++) word[k] = low.word[k], word[k + 4] = high.word[k];
#pragma unroll
  for (int k = 0; k < 6; k++) word[k] = offset & 8 ? word[k + 2] : word[k];
#pragma unroll
  for (int k = 0; k < 5; k++) word[k] = offset & 4 ? word[k + 1] : word[k];
  Bytes16 bytes;
#pragma unroll
  for (int k = 0; k < 4; k++) bytes.word[k] = (uint32_t)(((uint64_t)word[k + 1] << 32 | word[k]) >> (offset % 4 * 8));
  return bytes;
}

// The 16 aligned bytes that start at `column`, or 0 if none of them lies in the row. They may extend past the row's
// ends. That is safe: 16 aligned bytes lie in one page.
template <class T>
__device__ __forceinline__ Bytes16 load_bytes(const T* row, int column, int columns) {
  Bytes16 bytes{};
  if ((unsigned)(column + kVector<T> - 1) < (unsigned)(columns + kVector<T> - 1)) {
    const uint4 words = *(const uint4*)(row + column);
    bytes = {words.x, words.y, words.z, words.w};
  }
  return bytes;
}

// This thread's columns of the segment at `start`, which may lie before the row. Columns outside the row are arbitrary.
template <class T>
__device__ __forceinline__ void load_columns(const T* row, int columns, int start, float (&x)[kColumns]) {
  // All loads are issued before the first use of their results, so that they are in flight together.
  constexpr int kSteps = kColumns / kVector<T>;
  const unsigned offset = (uintptr_t)(row + start) % 16;
  Bytes16 bytes[kSteps];
  if (offset == 0) {
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      bytes[step] = load_bytes(row, column_of<T>(start, step * kVector<T>), columns);
    }
  } else {
    const int before = start - (int)(offset / sizeof(T));
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const int column = column_of<T>(before, step * kVector<T>);
      bytes[step] = shifted(load_bytes(row, column, columns), load_bytes(row, column + kVector<T>, columns), offset);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; step++) unpack(T{}, bytes[step], x + step * kVector<T>);
}

// The number of columns by which the segments are shifted to the left, so that `store_columns` stores aligned vectors.
template <class In, class Out>
__device__ __forceinline__ int columns_before(const Out* row) {
  return (int)((uintptr_t)row / sizeof(Out) % kVector<In>);
}

// Stores the columns that `load_columns` of an In loads. `start` is a multiple of kSegment minus columns_before(row).
template <class In, class Out>
__device__ __forceinline__ void store_columns(Out* row, int columns, int start, const float (&x)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; i += kVector<In>) {
    const int column = column_of<In>(start, i);
    if (column >= 0 && column + kVector<In> <= columns) {
      store_vector<kVector<In>>(row + column, x + i);
    } else {
#pragma unroll
      for (int k = 0; k < kVector<In>; k++) {
        if (column + k >= 0 && column + k < columns) store(row + column + k, x[i + k]);
      }
    }
  }
}

// Whether the segment contains the target or columns outside the vocabulary. Most do not, and need no comparison per
// column.
__device__ __forceinline__ bool is_mixed(int start, int vocab, int target) {
  return start + kSegment > vocab || (target >= start && target < start + kSegment);
}

__device__ __forceinline__ void cap(float (&x)[kColumns], float softcap) {
  if (softcap == 0) return;
#pragma unroll
  for (int i = 0; i < kColumns; i++) x[i] = softcap * tanhf(x[i] / softcap);
}

// ---- numbers of a row -----------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T* row_of(const Logits& logits, int64_t row) {
  return (T*)logits.data + row * logits.row_stride;
}

__device__ __forceinline__ bool is_live(const Rows& rows, int64_t row) { return !rows.live || rows.live[row]; }

__device__ __forceinline__ float inverse_temperature_of(const Rows& rows, int64_t row) {
  return 1 / (rows.temperatures ? rows.temperatures[row * rows.temperature_stride] : rows.temperature);
}

// The target, or -1 if it is not in the vocabulary.
__device__ __forceinline__ int target_of(const Rows& rows, int64_t row) {
  const int64_t target = rows.targets ? rows.targets[row] : -1;
  return target >= 0 && target < rows.vocab ? (int)target : -1;
}

// numbers[row], or 0 if the tensor is absent.
__device__ __forceinline__ float number_or_0(const float* numbers, int64_t row) { return numbers ? numbers[row] : 0; }

// ---- launches -------------------------------------------------------------------------------------------------------

inline int64_t segments_of(int64_t columns) { return ceil_div(columns, kSegment); }

// Calls `body` with a value of the type that `dtype` names.
template <class Body>
const char* typed(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

}  // namespace rlhf_fast::cuda
