// out = scale * left x right, or out += that, in float32. MKL, which torch calls, does not use its AVX-512 code on AMD
// processors.
//
// `inner` is the K dimension. Both factors are packed first, which makes all strides equally fast: left in groups of
// kLanes rows, right in groups of kLanes columns, and in a group the kLanes elements of one k are contiguous. A task
// computes a tile of out; kRows x kColumns of it are in registers at a time. Each element is the sum, in order, of its
// sums over blocks of kInner of K, so it depends only on its row, its column and K.
//
//   formula         out_ij = scale * sum_k left_ik right_kj, plus out_ij with `add`
//   bytes           a task reads its rows of left and columns of right once; out is read and written once per 384 of K
//   passes          one per 384 of K
//   error           1e-6 of the sum of the absolute products (tests/ops/test_float32_product.py)
#include "parallel.h"
#include "transpose.h"

namespace rlhf_fast::RLHF_FAST_PATH {
namespace {

// The accumulators take 24 of the 32 registers of AVX-512, and 12 of the 16 of AVX2: enough independent ones to hide
// the latency of an addition. A loaded vector is used kRows times.
constexpr int kVectors = 3;
constexpr int kColumns = kVectors * kLanes;
constexpr int kRows = kLanes == 16 ? 8 : 4;
constexpr int64_t kInner = 384;               // K of a block
constexpr int64_t kPanels = 96 / kLanes;      // panels of kColumns packed by a task: 432 KB, which stay in L2
constexpr int64_t kTaskRows = 512;            // rows of a task: enough to amortise packing its columns
constexpr int64_t kSerialProducts = 1 << 18;  // up to this many multiplications, one thread is used

typedef float Line[kLanes] __attribute__((aligned(4 * kLanes)));  // the elements of one k of kLanes rows or columns

// Packed data of a thread. Kept between products, because new memory would cost a page fault per 4 KB.
thread_local Line packed_rows[kInner];
thread_local Line packed_columns[kPanels * kVectors][kInner];

// Packs `inner` elements of up to kLanes of the `count` rows or columns of a factor, times `scale`; 0 past the last row
// or column. Scaling here and not the sums, because the compiler might fuse that multiplication with an addition.
void pack(const float* from, int64_t stride, int64_t inner_stride, int64_t count, int64_t inner, float scale,
          Line* to) {
  if (count > kLanes) count = kLanes;
  if (stride == 1) {
    for (int64_t k = 0; k < inner; k++) {
      __builtin_prefetch(from + k * inner_stride + kLanes);
      store(to[k], scale * load(from + k * inner_stride, (int)count));
    }
    return;
  }
  int64_t k = 0;
  if (inner_stride == 1) {
    for (; k + kLanes <= inner; k += kLanes) {
      F32 x[kLanes];
      for (int i = 0; i < kLanes; i++) x[i] = i < count ? load(from + i * stride + k) : F32{};
      transpose(x);
      for (int i = 0; i < kLanes; i++) store(to[k + i], scale * x[i]);
    }
  }
  for (; k < inner; k++) {
    for (int i = 0; i < kLanes; i++) to[k][i] = i < count ? scale * from[i * stride + k * inner_stride] : 0.0f;
  }
}

struct Tile {
  const float* left;  // kLanes elements per k
  const Line (*right)[kInner];
  int64_t inner;
  float* out;
  int64_t stride;
  bool add;
};

// The sizes of the tile are template arguments, so that the accumulators stay in registers.
template <int rows, int vectors>
void multiply(const Tile& t) {
  F32 sums[rows][vectors] = {};
  for (int64_t k = 0; k < t.inner; k++) {
    F32 columns[vectors];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) columns[v] = load(t.right[v][k]);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const F32 x = all(t.left[k * kLanes + r]);
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) sums[r][v] += x * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
      float* to = t.out + r * t.stride + v * kLanes;
      store(to, t.add ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

template <int rows>
void multiply_columns(int vectors, const Tile& t) {
  if (vectors == 1) return multiply<rows, 1>(t);
  if (vectors == 2) return multiply<rows, 2>(t);
  multiply<rows, 3>(t);
}

void multiply_rows(int rows, int vectors, const Tile& t) {
  switch (rows) {
    case 1: return multiply_columns<1>(vectors, t);
    case 2: return multiply_columns<2>(vectors, t);
    case 3: return multiply_columns<3>(vectors, t);
#if defined(__AVX512F__)
    case 4: return multiply_columns<4>(vectors, t);
    case 5: return multiply_columns<5>(vectors, t);
    case 6: return multiply_columns<6>(vectors, t);
    case 7: return multiply_columns<7>(vectors, t);
#endif
    default: return multiply_columns<kRows>(vectors, t);
  }
}

// A tile of up to kRows x kColumns. If its last vector is incomplete, it is computed in a buffer with whole vectors,
// and copied to and from out.
void multiply_any(int rows, int columns, const Tile& t) {
  const int vectors = (columns + kLanes - 1) / kLanes;
  if (columns == vectors * kLanes) return multiply_rows(rows, vectors, t);
  float out[kRows][kColumns] = {};
  Tile whole = t;
  whole.out = out[0], whole.stride = kColumns;
  for (int r = 0; t.add && r < rows; r++) memcpy(out[r], t.out + r * t.stride, columns * sizeof(float));
  multiply_rows(rows, vectors, whole);
  for (int r = 0; r < rows; r++) memcpy(t.out + r * t.stride, out[r], columns * sizeof(float));
}

RLHF_FAST_INLINE int64_t at_most(int64_t x, int64_t bound) { return x < bound ? x : bound; }

struct Range {
  int64_t start, stop;
};

// Part `part` of `parts` of [0, length), split at multiples of `unit`.
Range part_of(int64_t length, int64_t unit, int64_t parts, int64_t part) {
  const int64_t units = (length + unit - 1) / unit;
  const int64_t stop = units * (part + 1) / parts * unit;
  return {units * part / parts * unit, stop < length ? stop : length};
}

void multiply_tile(const Float32Product& a, Range rows, Range columns) {
  int64_t from = 0;
  do {  // runs once for K = 0, to write 0
    const int64_t inner = at_most(a.inner - from, kInner);
    for (int64_t column = columns.start; column < columns.stop; column += kLanes) {
      pack(a.right + column * a.right_column_stride + from * a.right_stride, a.right_column_stride, a.right_stride,
           columns.stop - column, inner, 1.0f, packed_columns[(column - columns.start) / kLanes]);
    }
    for (int64_t first = rows.start; first < rows.stop; first += kLanes) {
      pack(a.left + first * a.left_stride + from * a.left_inner_stride, a.left_stride, a.left_inner_stride,
           rows.stop - first, inner, a.scale, packed_rows);
      const int64_t last = at_most(rows.stop, first + kLanes);
      for (int64_t column = columns.start; column < columns.stop; column += kColumns) {
        const int width = (int)at_most(columns.stop - column, kColumns);
        for (int64_t row = first; row < last; row += kRows) {
          multiply_any((int)at_most(last - row, kRows), width,
                       {packed_rows[0] + (row - first), packed_columns + (column - columns.start) / kLanes, inner,
                        a.out + row * a.out_stride + column, a.out_stride, a.add || from > 0});
        }
      }
    }
    from += kInner;
  } while (from < a.inner);
}

}  // namespace

void float32_product(const Float32Product& a, int threads) {
  if (a.rows * a.columns * a.inner <= kSerialProducts) threads = 1;
  const int64_t panels = (a.columns + kColumns - 1) / kColumns, lines = (a.rows + kLanes - 1) / kLanes;
  int64_t column_parts = (panels + kPanels - 1) / kPanels, row_parts = (a.rows + kTaskRows - 1) / kTaskRows;
  // At least three tasks per thread, so that all threads finish at about the same time. The tasks stay nearly square,
  // which minimises packing.
  while (row_parts * column_parts < 3 * threads && threads > 1) {
    const bool wide = lines * kLanes * column_parts < panels * kColumns * row_parts;
    if (column_parts < panels && (wide || row_parts >= lines)) {
      column_parts++;
    } else if (row_parts < lines) {
      row_parts++;
    } else {
      break;
    }
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t task = 0; task < row_parts * column_parts; task++) {
    multiply_tile(a, part_of(a.rows, kLanes, row_parts, task / column_parts),
                  part_of(a.columns, kColumns, column_parts, task % column_parts));
  }
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
