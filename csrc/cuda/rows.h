// A row of logits on a GPU: a block of threads holds a segment of its columns in registers, read by 16-byte loads.
//
// Which columns a thread holds depends on neither the row's address nor its neighbours, so that sums over them do not.
// A row of 50257 bfloat16 columns begins at any even address: there a thread reads both of the aligned 16 bytes that
// its own lie in, the second out of the first-level cache, and shifts them together.
#pragma once

#include "halves.h"

namespace rlhf_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kColumns = 32;                   // of a thread
constexpr int kSegment = kThreads * kColumns;  // of a block

// Columns that a thread has side by side.
template <class T>
constexpr int kVector = 16 / sizeof(T);

struct RowSegment {
  int64_t row;
  int segment;
};

// Of this block: those side by side read memory side by side.
__device__ __forceinline__ RowSegment segment_of_block(int segments) {
  const unsigned row = blockIdx.x / (unsigned)segments;
  return {row, (int)(blockIdx.x - row * segments)};
}

// Of a thread's x[i], in the segment from `start` on.
template <class T>
__device__ __forceinline__ int column_of(int start, int i) {
  constexpr int kWidth = kVector<T>;
  return start + i / kWidth * (kThreads * kWidth) + (int)threadIdx.x * kWidth + i % kWidth;
}

// The 16 bytes that begin `offset` bytes after `low` does.
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

// 16 aligned bytes, the first of which is that of `column`; 0 where none of them lies in the row. They may reach past
// the row's ends, but not past the memory's: 16 aligned bytes lie in one piece of it.
template <class T>
__device__ __forceinline__ Bytes16 load_bytes(const T* row, int column, int columns) {
  Bytes16 bytes{};
  if ((unsigned)(column + kVector<T> - 1) < (unsigned)(columns + kVector<T> - 1)) {
    const uint4 words = *(const uint4*)(row + column);
    bytes = {words.x, words.y, words.z, words.w};
  }
  return bytes;
}

// This thread's columns of the segment from `start` on, which may begin before the row does. What lies outside the row
// is arbitrary.
template <class T>
__device__ __forceinline__ void load_columns(const T* row, int columns, int start, float (&x)[kColumns]) {
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

// How many columns before the row the segments of `store_columns` begin.
template <class In, class Out>
__device__ __forceinline__ int columns_before(const Out* row) {
  return (int)((uintptr_t)row / sizeof(Out) % kVector<In>);
}

// What `load_columns` of an In has the columns of; `start` lies columns_before(row) before a multiple of a segment.
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

// Whether some column of the segment is the target or lies outside the vocabulary: in most none is.
__device__ __forceinline__ bool is_mixed(int start, int vocab, int target) {
  return start + kSegment > vocab || (target >= start && target < start + kSegment);
}

__device__ __forceinline__ void cap(float (&x)[kColumns], float softcap) {
  if (softcap == 0) return;
#pragma unroll
  for (int i = 0; i < kColumns; i++) x[i] = softcap * tanhf(x[i] / softcap);
}

// ---- per-row numbers ------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T* row_of(const Logits& logits, int64_t row) {
  return (T*)logits.data + row * logits.row_stride;
}

__device__ __forceinline__ bool is_live(const Rows& rows, int64_t row) { return !rows.live || rows.live[row]; }

__device__ __forceinline__ float inverse_temperature_of(const Rows& rows, int64_t row) {
  return 1 / rows.temperature[row * rows.temperature_stride];
}

// -1 where the row has none in the vocabulary.
__device__ __forceinline__ int target_of(const Rows& rows, int64_t row) {
  const int64_t target = rows.targets ? rows.targets[row] : -1;
  return target >= 0 && target < rows.vocab ? (int)target : -1;
}

// 0 where there are none.
__device__ __forceinline__ float number_of(const float* numbers, int64_t row) { return numbers ? numbers[row] : 0; }

// ---- launches -------------------------------------------------------------------------------------------------------

inline int64_t segments_of(int64_t columns) { return ceil_div(columns, kSegment); }

// A part of the scratch, which is there once `scratch.needed` has been given.
template <class T>
T* take(Scratch& scratch, int64_t count) {
  T* part = (T*)((char*)scratch.data + scratch.needed);
  scratch.needed += ceil_div(count * sizeof(T), 16) * 16;
  return part;
}

// Calls `body` with a value of the type.
template <class Body>
const char* typed(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

}  // namespace rlhf_fast::cuda
