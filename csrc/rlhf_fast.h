// Declares every launcher of the compiled engine. Its arguments are a structure of records.h. Uses neither torch nor
// Python.
#pragma once

#include <cstddef>

#include "records.h"

namespace rlhf_fast {

// The kStatistics floats per row of logits that the backward needs.
struct RowStatistics {
  float shift;        // the largest logit except the target's, after the softcap, before the temperature
  float others_mass;  // 1 - p_target
  float scale;        // p_j = e^((x_j - shift) / temperature) * scale
  float log_norm;     // log p_j = (x_j - shift) / temperature - log_norm
};

static_assert(sizeof(RowStatistics) == kStatistics * sizeof(float));

// out (rows, columns) = scale * left (rows, inner) x right (inner, columns), or += with `add`. `inner` is the K
// dimension. The columns of out are contiguous.
struct Float32Product {
  int64_t rows, columns, inner;
  const float* left;
  int64_t left_stride, left_inner_stride;
  const float* right;
  int64_t right_stride, right_column_stride;
  float* out;
  int64_t out_stride;
  float scale;
  bool add;
};

// One row of numbers per token and head. The last stride is 1.
struct HeadRows {
  void* data;
  int64_t row_stride, head_stride;
};

// Attention over packed sequences, or its gradients where grad_out.data is not nullptr. `width` is that of query and
// key; each of the `shared` heads of key and value serves heads / shared heads of query.
struct ShortAttention {
  DType dtype;
  int64_t sequences, heads, shared, width, value_width, longest;
  const int64_t* starts;  // (sequences + 1,) the first token of each sequence, and the number of tokens
  const uint8_t* mask;    // (longest, longest) bool between two positions of a sequence: 1 = attends
  float scale;
  HeadRows query, key, value, out;
  float* log_sums;  // (tokens, heads), of the scores
  HeadRows grad_out, grad_query, grad_key, grad_value;
  // (threads, scratch_size) floats: the longest sequence's rows of query (of all heads that share a key), key and
  // value, the gradients of two of them, and twice its scores.
  float* scratch;
  int64_t scratch_size;
};

// ---- CPU launchers, compiled once for each instruction set ----------------------------------------------------------

struct CpuLaunchers {
  const char* path;  // "avx512", "avx2" or "portable"
#define RLHF_FAST_MEMBER(name, Arguments) void (*name)(const Arguments&, int threads);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_MEMBER)
  RLHF_FAST_MEMBER(float32_product, Float32Product)
  RLHF_FAST_MEMBER(short_attention, ShortAttention)
#undef RLHF_FAST_MEMBER
};

#define RLHF_FAST_DECLARE(name, Arguments) void name(const Arguments&, int threads);
#define RLHF_FAST_DECLARE_PATH(path_name)            \
  namespace path_name {                              \
  RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)             \
  RLHF_FAST_DECLARE(float32_product, Float32Product) \
  RLHF_FAST_DECLARE(short_attention, ShortAttention) \
  }
RLHF_FAST_DECLARE_PATH(avx512)
RLHF_FAST_DECLARE_PATH(avx2)
RLHF_FAST_DECLARE_PATH(portable)
#undef RLHF_FAST_DECLARE_PATH
#undef RLHF_FAST_DECLARE

// The paths of this build that this processor can run, best first, terminated by nullptr.
const CpuLaunchers* const* cpu_paths();
// The path in use: the best one, unless choose_cpu_path chose another. choose_cpu_path returns false if the path cannot
// run here.
const CpuLaunchers& cpu();
bool choose_cpu_path(const char* path);

// scale * left (stop - start, inner) x right (inner, columns), bfloat16, added to rows [start, stop) of a result. The
// last stride of left is 1.
struct BFloat16Term {
  const uint16_t* left;
  int64_t left_stride;
  const uint16_t* right;
  int64_t right_stride, right_column_stride;
  const uint32_t* packed;  // right, from pack_bfloat16; nullptr: `right` is read
  int64_t inner, start, stop;
  float scale;  // not 0 where another term with the same rows stands before
};

// out (rows, columns) = bias + the sum of the terms, in float32 (`wide`) or bfloat16. Its last stride is 1.
struct BFloat16Product {
  static constexpr int kColumns = 48;  // a panel
  int64_t rows, columns;
  const BFloat16Term* terms;
  int count;
  const uint16_t* bias;  // (columns,) or nullptr
  void* out;
  int64_t out_stride;
  bool wide;
  int threads;
};
// Whether float32_product computes float32 products, not torch. Decided by the maker of the processor, not by timing,
// so that every run gives the same bits. MKL, which torch calls, uses its best code only on Intel's processors, where
// it is near the peak. On AMD's, float32_product is as fast or faster on the vector paths. On the portable one it is
// slower, but unlike MKL it gives the same bits for any number of threads.
bool multiplies_float32();

// Whether the chosen path has the instructions for bfloat16_product, which otherwise must not be called.
bool multiplies_bfloat16();
// Whether bfloat16_product computes bfloat16 products, not torch. Decided by the maker of the processor too: Intel's
// with these instructions mostly have AMX, which torch uses.
bool prefers_bfloat16();
// Returns false if there is no memory for the packed columns.
bool bfloat16_product(const BFloat16Product&);
// Packs term.right: (panels, (inner + 1) / 2, kColumns) pairs of neighbours along K.
void pack_bfloat16(const BFloat16Term& term, int64_t columns, uint32_t* packed, int threads);

// ---- CUDA launchers: the same arguments, scratch memory and a stream -------------------------------------------------

// Device memory for intermediate results. A launcher sets `needed` first, and launches only if `size` >= `needed`.
struct Scratch {
  void* data;
  size_t size;
  size_t needed;
  unsigned* ticket;  // for launches whose last block adds the parts of all blocks; 0 before and after each launch
};

namespace cuda {
// Returns nullptr, or CUDA's error message. No launcher waits for the device.
#define RLHF_FAST_DECLARE(name, Arguments) const char* name(const Arguments&, Scratch&, void* stream);
RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

// Why the kernels cannot run on the current device: CUDA's error message, or nullptr if they can.
const char* cannot_run();
}  // namespace cuda

}  // namespace rlhf_fast
