// Loads and stores of rows of logits. A block holds a segment of a row's columns in registers, read by 16-byte loads.
//
// The assignment of columns to threads does not depend on the address of the row, so a sum does not either. A row of
// 50257 bfloat16 columns may start at any even address. A thread's 16 bytes then span two aligned groups of 16 bytes.
// The thread loads both, the second mostly from L1 because the next thread loads it too, and shifts the bytes together.
// Where a gradient takes the place of its logits, another block may write the neighbour's half of such a group. So
// nothing here may be loaded by __ldg, through `const __restrict__` or by TMA, which take memory for unchanging.
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

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// The column of this thread's x[i] in the segment at `start`. In each step a warp reads 512 consecutive bytes.
template <class T>
__device__ __forceinline__ int column_of(int start, int i) {
  constexpr int kWidth = kVector<T>;
  return start + i / kWidth * (kThreads * kWidth) + (int)threadIdx.x * kWidth + i % kWidth;
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

// A thread's columns of a segment as they lie in memory: the aligned 16 bytes in which each vector begins.
template <class T>
struct Loaded {
  static constexpr int kSteps = kColumns / kVector<T>;
  Bytes16 bytes[kSteps];
};

// The bytes by which the segment at `start` lies behind an address that is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ unsigned offset_of(const T* row, int start) {
  return (uintptr_t)(row + start) % 16;
}

// Issues the loads of this thread's columns of the segment at `start`, which may lie before the row. Nothing waits for
// them here, so that they are in flight together.
template <class T>
__device__ __forceinline__ Loaded<T> issue_loads(const T* row, int columns, int start) {
  Loaded<T> loaded;
  const int before = start - (int)(offset_of(row, start) / sizeof(T));
#pragma unroll
  for (int step = 0; step < Loaded<T>::kSteps; step++) {
    loaded.bytes[step] = load_bytes(row, column_of<T>(before, step * kVector<T>), columns);
  }
  return loaded;
}

// The 16 bytes that begin kWords words and kBits bits after the beginning of `low`, and end in `high`.
template <int kWords, int kBits>
__device__ __forceinline__ Bytes16 shifted(const Bytes16& low, const Bytes16& high) {
  uint32_t word[8];
#pragma unroll
  for (int k = 0; k < 4; k++) word[k] = low.word[k], word[k + 4] = high.word[k];
  Bytes16 bytes;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    bytes.word[k] = (uint32_t)(((uint64_t)word[kWords + k + (kBits > 0)] << 32 | word[kWords + k]) >> kBits);
  }
  return bytes;
}

// The vectors of the segment at `start`, which begin 4 * kWords + kBits / 8 bytes behind an aligned address. low(step)
// are the aligned 16 bytes in which the vector of a step begins.
template <int kWords, int kBits, class T, class Low>
__device__ __forceinline__ void shift_vectors(const Low& low, const T* row, int columns, int start, Loaded<T>& to) {
  const int after = start - (4 * kWords + kBits / 8) / (int)sizeof(T) + kVector<T>;
#pragma unroll
  for (int step = 0; step < Loaded<T>::kSteps; step++) {
    const Bytes16 high = load_bytes(row, column_of<T>(after, step * kVector<T>), columns);
    to.bytes[step] = shifted<kWords, kBits>(low(step), high);
  }
}

// For an offset that is not 0. It is the same in all threads of the block, so one case runs.
template <class T, class Low>
__device__ __forceinline__ void align_vectors(const Low& low, const T* row, int columns, int start, Loaded<T>& to) {
  const unsigned offset = offset_of(row, start);
  const auto shift = [&](auto words, auto bits) {
    shift_vectors<words.value, bits.value>(low, row, columns, start, to);
  };
  if (sizeof(T) == 2 && offset % 4 == 2) {
    constexpr Constant<sizeof(T) == 2 ? 16 : 0> half;
    switch (offset / 4) {
      case 0: return shift(Constant<0>{}, half);
      case 1: return shift(Constant<1>{}, half);
      case 2: return shift(Constant<2>{}, half);
      default: return shift(Constant<3>{}, half);
    }
  }
  switch (offset / 4) {
    case 1: return shift(Constant<1>{}, Constant<0>{});
    case 2: return shift(Constant<2>{}, Constant<0>{});
    default: return shift(Constant<3>{}, Constant<0>{});
  }
}

template <class T>
__device__ __forceinline__ void unpack_vectors(const Loaded<T>& vectors, float (&x)[kColumns]) {
#pragma unroll
  for (int step = 0; step < Loaded<T>::kSteps; step++) unpack(T{}, vectors.bytes[step], x + step * kVector<T>);
}

// The columns of issue_loads(row, columns, start). Columns outside the row are arbitrary.
template <class T>
__device__ __forceinline__ void unpack_columns(Loaded<T> loaded, const T* row, int columns, int start,
                                               float (&x)[kColumns]) {
  const auto low = [&](int step) { return loaded.bytes[step]; };
  if (offset_of(row, start) != 0) align_vectors(low, row, columns, start, loaded);
  unpack_vectors(loaded, x);
}

template <class T>
__device__ __forceinline__ void load_columns(const T* row, int columns, int start, float (&x)[kColumns]) {
  const unsigned offset = offset_of(row, start);
  Loaded<T> loaded;
  if (offset == 0) {
    loaded = issue_loads(row, columns, start);
  } else {
    const int before = start - (int)(offset / sizeof(T));
    const auto low = [&](int step) { return load_bytes(row, column_of<T>(before, step * kVector<T>), columns); };
    align_vectors(low, row, columns, start, loaded);
  }
  unpack_vectors(loaded, x);
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

// kCapped: whether there is a softcap. Its tanh would triple the code of the kernels that have none.
template <bool kCapped>
__device__ __forceinline__ void cap(float (&x)[kColumns], float softcap) {
  if constexpr (kCapped) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) x[i] = softcap * tanhf(x[i] / softcap);
  }
}

// ---- numbers of a row -----------------------------------------------------------------------------------------------

// A launch has fewer than 2^31 rows, and a 64-bit division would be slow.
template <class T>
__device__ __forceinline__ T* row_of(const Logits& logits, int64_t row) {
  const unsigned batch = (unsigned)row / (unsigned)logits.batch_rows;
  return (T*)logits.data + batch * logits.batch_stride + (row - batch * logits.batch_rows) * logits.row_stride;
}

__device__ __forceinline__ bool is_live(const Rows& rows, int64_t row) {
  return (!rows.live || rows.live[row]) && (!rows.targets || rows.targets[row] != rows.ignore_index);
}

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
