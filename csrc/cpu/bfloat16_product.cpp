// out = bias + the sum of products of bfloat16 matrices. A layer and its adapters are one such sum. Needs AVX-512 BF16;
// the only file written in intrinsics.
//
// `inner` is the K dimension. A task computes a panel of kColumns columns and a block of rows of out. It packs the
// panel's part of the right factors as pairs along K, the operand of vdpbf16ps, and multiplies it with kRows rows at a
// time. The order of the sums of an element depends only on the K and the scale of the terms.
//
//   formula         out_ij = bias_j + sum over terms of scale * sum_k left_ik right_kj
//   bytes           the left factors are read once per 48 columns of out, the right ones once per 2048 rows; out is
//                   written once
//   passes          one per 4096 of the sum of K; float32 sums are kept in scratch memory between passes
//   error           products are exact, sums are float32, one rounding to the dtype of out
#include <cstdlib>
#include <cstring>

#include "../rlhf_fast.h"

#ifdef __AVX512BF16__
#include "transpose.h"

namespace rlhf_fast {
namespace {

using bfloat16::transpose;

// Registers: 8 x 3 accumulators, 3 vectors of columns and 1 of the left factor are 28 of 32. 24 independent
// accumulators hide the latency of the instruction.
constexpr int kColumns = BFloat16Product::kColumns;
constexpr int kVectors = kColumns / 16;
constexpr int kRows = 8;
constexpr int64_t kPairs = 2048;     // packed at a time, 384 KB, which stay in L2
constexpr int64_t kTaskRows = 2048;  // enough for the packing to take a hundredth of the time
constexpr int64_t kSerialProducts = 1 << 18;

typedef uint32_t Pairs[kColumns];  // elements k and k + 1 of each column of a panel

int64_t pairs_of(int64_t inner) { return (inner + 1) / 2; }

// Packs `width` columns from `column` on, K from `from` to `to`; 0 past the last column and past an odd K.
void pack(const BFloat16Term& term, int64_t column, int64_t width, int64_t from, int64_t to, Pairs* packed) {
  const uint16_t* right = term.right + column * term.right_column_stride + from * term.right_stride;
  const int64_t pairs = pairs_of(to - from), whole = (to - from) / 2;
  for (int first = 0; first < kColumns; first += 16) {
    const int64_t count = width - first < 0 ? 0 : width - first < 16 ? width - first : 16;
    const uint16_t* start = right + first * term.right_column_stride;
    int64_t p = 0;
    if (term.right_stride == 1) {
      for (; p + 16 <= whole; p += 16) {
        bfloat16::I32 x[16];
        for (int c = 0; c < 16; c++) {
          const uint16_t* pairs_of_column = start + c * term.right_column_stride + 2 * p;
          __builtin_prefetch(pairs_of_column + 16 * term.right_column_stride);
          x[c] = bfloat16::I32{};
          if (c < count) memcpy(&x[c], pairs_of_column, sizeof(x[c]));
        }
        transpose(x);
        for (int i = 0; i < 16; i++) memcpy(packed[p + i] + first, &x[i], sizeof(x[i]));
      }
    } else if (term.right_column_stride == 1) {
      const __mmask16 columns = (__mmask16)((1u << count) - 1);
      for (; p < pairs; p++) {
        const uint16_t* row = start + 2 * p * term.right_stride;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, row));
        const __m512i high = _mm512_cvtepu16_epi32(
            p < whole ? _mm256_maskz_loadu_epi16(columns, row + term.right_stride) : _mm256_setzero_si256());
        _mm512_storeu_si512(packed[p] + first, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
    for (; p < pairs; p++) {
      for (int c = 0; c < 16; c++) {
        const uint16_t* pair = start + c * term.right_column_stride + 2 * p * term.right_stride;
        const uint32_t low = c < count ? pair[0] : 0, high = c < count && p < whole ? pair[term.right_stride] : 0;
        packed[p][first + c] = low | high << 16;
      }
    }
  }
}

// K from `from` to `to` of a term.
struct Piece {
  const BFloat16Term* term;
  int64_t from, to;
  const Pairs* packed;
};

// The factor of a row's sums after a piece: the term's scale relative to that of the next term, which multiplies both.
float factor_after(const BFloat16Product& a, const Piece& piece, int64_t row) {
  if (piece.to < piece.term->inner) return 1.0f;
  for (const BFloat16Term* next = piece.term + 1; next < a.terms + a.count; next++) {
    if (next->start <= row && row < next->stop) return piece.term->scale / next->scale;
  }
  return piece.term->scale;
}

// Elements k and k + 1 of a row of a left factor, in all lanes. Without a k + 1 (`whole` = false) it is 0, not read.
inline __m512bh pair_of(const uint16_t* left, bool whole) {
  uint32_t pair = *left;
  if (whole) memcpy(&pair, left, 4);
  return (__m512bh)_mm512_set1_epi32((int)pair);
}

struct Tile {
  const Piece* pieces;
  int count;
  int64_t row;
  __mmask16 masks[kVectors];  // of the columns that exist
  float* partial;             // (rows, kColumns), the sums between two chunks of pieces
  bool first, last;           // chunk
  const BFloat16Product* out;
  int64_t column;
};

template <int rows, int vectors>
void multiply(const Tile& t) {
  __m512 sums[rows][vectors];
  // 1. The sums so far.
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < vectors; v++) {
      sums[r][v] = t.first ? _mm512_setzero_ps() : _mm512_loadu_ps(t.partial + r * kColumns + 16 * v);
    }
  }
  // 2. The products: each packed vector is loaded once for all rows.
  for (int i = 0; i < t.count; i++) {
    const Piece& piece = t.pieces[i];
    const BFloat16Term& term = *piece.term;
    if (t.row < term.start || t.row >= term.stop) continue;
    const uint16_t* left = term.left + (t.row - term.start) * term.left_stride + piece.from;
    const int64_t stride = term.left_stride, pairs = pairs_of(piece.to - piece.from);
    const auto add_pair = [&](int64_t p, bool whole) __attribute__((always_inline)) {
      __m512bh columns[vectors];
#pragma GCC unroll 3
      for (int v = 0; v < vectors; v++) columns[v] = (__m512bh)_mm512_loadu_si512(piece.packed[p] + 16 * v);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        const __m512bh pair = pair_of(left + r * stride + 2 * p, whole);
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], columns[v], pair);
      }
    };
    for (int64_t p = 0; p < (piece.to - piece.from) / 2; p++) add_pair(p, true);
    if ((piece.to - piece.from) % 2) add_pair(pairs - 1, false);
    const float factor = factor_after(*t.out, piece, t.row);
    if (factor == 1.0f) continue;
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < vectors; v++) sums[r][v] *= factor;
    }
  }
  // 3. The result, or the sums for the next chunk.
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < vectors; v++) {
      const int64_t place = (t.row + r) * t.out->out_stride + t.column + 16 * v;
      if (!t.last) {
        _mm512_storeu_ps(t.partial + r * kColumns + 16 * v, sums[r][v]);
        continue;
      }
      if (t.out->bias) {
        const __m256i bias = _mm256_maskz_loadu_epi16(t.masks[v], t.out->bias + t.column + 16 * v);
        sums[r][v] += (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16);
      }
      if (t.out->wide) {
        _mm512_mask_storeu_ps((float*)t.out->out + place, t.masks[v], sums[r][v]);
      } else {
        _mm256_mask_storeu_epi16((uint16_t*)t.out->out + place, t.masks[v], (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
      }
    }
  }
}

// The sizes of a tile are template arguments, so that the loops unroll and the sums stay in registers.
template <int rows>
void multiply_columns(int vectors, const Tile& t) {
  if (vectors == 1) return multiply<rows, 1>(t);
  if (vectors == 2) return multiply<rows, 2>(t);
  multiply<rows, 3>(t);
}

void multiply_rows(int64_t rows, int vectors, const Tile& t) {
  switch (rows) {
    case 1: return multiply_columns<1>(vectors, t);
    case 2: return multiply_columns<2>(vectors, t);
    case 3: return multiply_columns<3>(vectors, t);
    case 4: return multiply_columns<4>(vectors, t);
    case 5: return multiply_columns<5>(vectors, t);
    case 6: return multiply_columns<6>(vectors, t);
    case 7: return multiply_columns<7>(vectors, t);
    default: return multiply_columns<kRows>(vectors, t);
  }
}

// The end of the tile that begins at `row`: it must not contain the first or the last row of a term.
int64_t tile_end(const BFloat16Product& a, int64_t row, int64_t stop) {
  int64_t end = row + kRows < stop ? row + kRows : stop;
  for (int i = 0; i < a.count; i++) {
    const BFloat16Term& term = a.terms[i];
    if (row < term.start && term.start < end) end = term.start;
    if (row < term.stop && term.stop < end) end = term.stop;
  }
  return end;
}

struct Memory {
  Pairs* packed;   // kPairs
  Piece* pieces;   // as many as terms
  float* partial;  // (kTaskRows, kColumns)
};

void multiply_panel(const BFloat16Product& a, int64_t panel, int64_t start, int64_t stop, const Memory& memory) {
  Tile t{memory.pieces, 0, 0, {}, memory.partial, true, false, &a, panel * kColumns};
  const int64_t width = a.columns - t.column < kColumns ? a.columns - t.column : kColumns;
  for (int v = 0; v < kVectors; v++) {
    const int64_t left = width - 16 * v;
    t.masks[v] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
  }
  int term = 0;
  int64_t from = 0;
  do {  // a chunk of pieces; once where there is no term
    int64_t used = 0;
    for (t.count = 0; term < a.count && used < kPairs;) {
      const BFloat16Term& x = a.terms[term];
      const int64_t to = x.inner - from < 2 * (kPairs - used) ? x.inner : from + 2 * (kPairs - used);
      Pairs* packed = memory.packed + used;
      if (x.packed) {
        packed = (Pairs*)x.packed + panel * pairs_of(x.inner) + from / 2;
      } else {
        pack(x, t.column, width, from, to, packed);
      }
      memory.pieces[t.count++] = {&x, from, to, packed};
      used += pairs_of(to - from);
      from = to;
      if (to == x.inner) term++, from = 0;
    }
    t.last = term == a.count;
    for (t.row = start; t.row < stop;) {
      const int64_t end = tile_end(a, t.row, stop);
      t.partial = memory.partial + (t.row - start) * kColumns;
      multiply_rows(end - t.row, (int)((width + 15) / 16), t);
      t.row = end;
    }
    t.first = false;
  } while (!t.last);
}

}  // namespace

bool bfloat16_product(const BFloat16Product& a) {
  int64_t inner = 0;
  for (int i = 0; i < a.count; i++) inner += a.terms[i].inner;
  const int threads = a.rows * a.columns * inner <= kSerialProducts ? 1 : a.threads;
  const int64_t panels = (a.columns + kColumns - 1) / kColumns;
  int64_t parts = (a.rows + kTaskRows - 1) / kTaskRows;
  // Several tasks a thread, so that none waits long for the last; not so few rows that packing takes most of the time.
  while (threads > 1 && panels * parts < 4 * threads && a.rows / parts > 128) parts++;
  const int64_t rows = parts ? ((a.rows + parts - 1) / parts + kRows - 1) / kRows * kRows : 0;
  bool enough_memory = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : enough_memory)
  {
    const size_t packed = kPairs * sizeof(Pairs), partial = rows * sizeof(float) * kColumns;
    char* memory = (char*)aligned_alloc(64, packed + partial + (a.count * sizeof(Piece) + 63) / 64 * 64);
    enough_memory = memory != nullptr;
    const Memory places{(Pairs*)memory, (Piece*)(memory + packed + partial), (float*)(memory + packed)};
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * parts; task++) {
      const int64_t start = task % parts * rows, stop = start + rows < a.rows ? start + rows : a.rows;
      if (enough_memory) multiply_panel(a, task / parts, start, stop, places);
    }
    free(memory);
  }
  return enough_memory;
}

void pack_bfloat16(const BFloat16Term& term, int64_t columns, uint32_t* packed, int threads) {
  const int64_t panels = (columns + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) if (threads > 1 && columns * term.inner > kSerialProducts)
  for (int64_t panel = 0; panel < panels; panel++) {
    pack(term, panel * kColumns, columns - panel * kColumns, 0, term.inner,
         (Pairs*)packed + panel * pairs_of(term.inner));
  }
}

}  // namespace rlhf_fast

#else

namespace rlhf_fast {
bool bfloat16_product(const BFloat16Product&) { return false; }
void pack_bfloat16(const BFloat16Term&, int64_t, uint32_t*, int) {}
}  // namespace rlhf_fast

#endif
