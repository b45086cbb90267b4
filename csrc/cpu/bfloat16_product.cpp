// out = left x right^T, bfloat16 to float32. torch's product would round the logits to bfloat16, which changes a
// log-prob by up to 2^-9 of the largest logit. Needs AVX-512 BF16; the only file written in intrinsics.
//
// `inner` is the K dimension. A task computes a panel of 64 columns of out. It packs the panel's part of right once, as
// pairs along K, the operand of vdpbf16ps, and multiplies it with six rows at a time. The order of the sums depends
// only on K.
//
//   formula         out_ij = sum_k left_ik right_jk
//   bytes           left is read once per 64 columns of out, right once; out is written once per 2048 of K
//   passes          one per 2048 of K
//   error           products are exact, sums are float32
#include <cstdlib>
#include <cstring>

#include "../rlhf_fast.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace rlhf_fast {
namespace {

// Registers: 6 x 4 accumulators, 4 vectors of columns and 1 of the left matrix are 29 of 32. 24 independent
// accumulators hide the latency of the instruction.
constexpr int kColumns = 64;
constexpr int kVectors = kColumns / 16;
constexpr int kRows = 6;
constexpr int64_t kInner = 2048;  // K of a packed panel, which takes 256 KB and stays in L2

// Packs columns [column, column + 64) of right^T, K from `from` to `to`, as (pairs, 64) pairs of bfloat16; 0 past the
// ends.
void pack(const BFloat16Product& a, int64_t column, int64_t from, int64_t to, uint32_t* packed) {
  const int64_t pairs = (to - from + 1) / 2;
  for (int64_t c = 0; c < kColumns; c++) {
    if (column + c >= a.columns) {
      for (int64_t p = 0; p < pairs; p++) packed[p * kColumns + c] = 0;
      continue;
    }
    const uint16_t* row = a.right + (column + c) * a.right_stride + from;
    for (int64_t p = 0; p < (to - from) / 2; p++) memcpy(&packed[p * kColumns + c], row + 2 * p, 4);
    if ((to - from) % 2) packed[(pairs - 1) * kColumns + c] = row[to - from - 1];
  }
}

// Broadcasts two consecutive elements of a row of `left`. If the second is past the end of K, it is 0 and is not read.
inline __m512bh pair_of(const uint16_t* left, int64_t index, bool whole) {
  uint32_t pair = left[index];
  if (whole) memcpy(&pair, left + index, 4);
  return (__m512bh)_mm512_set1_epi32((int)pair);
}

// Adds the products of K from `from` to `to` to a tile of `rows` x 64 of `out`.
template <int rows>
void multiply(const BFloat16Product& a, int64_t row, int64_t column, int64_t from, int64_t to, const uint32_t* packed) {
  __m512 sums[rows][kVectors];
  float* out = a.out + row * a.out_stride + column;
  const int64_t width = a.columns - column < kColumns ? a.columns - column : kColumns;
  // 1. The masks exclude columns past the right edge.
  __mmask16 masks[kVectors];
  for (int v = 0; v < kVectors; v++) {
    const int64_t left = width - 16 * v;
    masks[v] = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
  }
  // 2. The sums over earlier K. Continuing them gives the same order of additions as without blocks of K.
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < kVectors; v++) {
      sums[r][v] = from == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(masks[v], out + r * a.out_stride + 16 * v);
    }
  }
  // 3. The products. Each packed vector is loaded once for all rows.
  const uint16_t* left = a.left + row * a.left_stride + from;
  const int64_t pairs = (to - from + 1) / 2;
  for (int64_t p = 0; p < pairs; p++) {
    const bool whole = 2 * p + 1 < to - from;
    __m512bh columns[kVectors];
    for (int v = 0; v < kVectors; v++) columns[v] = (__m512bh)_mm512_loadu_si512(packed + p * kColumns + 16 * v);
    for (int r = 0; r < rows; r++) {
      const __m512bh pair = pair_of(left + r * a.left_stride, 2 * p, whole);
      for (int v = 0; v < kVectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], columns[v], pair);
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < kVectors; v++) _mm512_mask_storeu_ps(out + r * a.out_stride + 16 * v, masks[v], sums[r][v]);
  }
}

// The number of rows is a template argument, so that the loops are unrolled and the accumulators stay in registers.
void multiply_rows(const BFloat16Product& a, int64_t row, int64_t column, int64_t from, int64_t to,
                   const uint32_t* packed) {
  switch (a.rows - row) {
    case 1: return multiply<1>(a, row, column, from, to, packed);
    case 2: return multiply<2>(a, row, column, from, to, packed);
    case 3: return multiply<3>(a, row, column, from, to, packed);
    case 4: return multiply<4>(a, row, column, from, to, packed);
    case 5: return multiply<5>(a, row, column, from, to, packed);
    default: return multiply<kRows>(a, row, column, from, to, packed);
  }
}

}  // namespace

bool bfloat16_product(const BFloat16Product& a) {
  const int64_t inner = a.inner < kInner ? a.inner : kInner;
  const int64_t blocks = (a.columns + kColumns - 1) / kColumns;
  bool enough_memory = true;
#pragma omp parallel num_threads(a.threads) reduction(&& : enough_memory)
  {
    uint32_t* packed = (uint32_t*)aligned_alloc(64, (inner + 1) / 2 * kColumns * sizeof(uint32_t));
    enough_memory = packed != nullptr;
#pragma omp for schedule(dynamic, 4)
    for (int64_t block = 0; block < blocks; block++) {
      for (int64_t from = 0; enough_memory && from < a.inner; from += kInner) {
        const int64_t to = a.inner - from < kInner ? a.inner : from + kInner;
        pack(a, block * kColumns, from, to, packed);
        for (int64_t row = 0; row < a.rows; row += kRows) multiply_rows(a, row, block * kColumns, from, to, packed);
      }
    }
    free(packed);
  }
  return enough_memory;
}

}  // namespace rlhf_fast

#else

namespace rlhf_fast {
bool bfloat16_product(const BFloat16Product&) { return false; }
}  // namespace rlhf_fast

#endif
