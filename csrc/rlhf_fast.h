// Every launcher of the compiled engine. Its arguments are a structure of records.h. No torch and no Python here.
#pragma once

#include <cstddef>

#include "records.h"

namespace rlhf_fast {

// What the backward needs of a row of logits: the kStatistics floats of its statistics.
struct RowStatistics {
  float shift;        // the largest logit but the target's, after the softcap, before the temperature
  float others_mass;  // 1 - p_target
  float scale;        // p_j = e^((x_j - shift) / temperature) * scale
  float log_norm;     // log p_j = (x_j - shift) / temperature - log_norm
};

static_assert(sizeof(RowStatistics) == kStatistics * sizeof(float));

// out (rows, columns) = scale * left (rows, inner) right (inner, columns), or out += it. The columns of out lie side by
// side.
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

// ---- the CPU's launchers, compiled once for each instruction set -----------------------------------------------------

struct CpuLaunchers {
  const char* path;  // "avx512", "avx2" or "portable"
#define RLHF_FAST_MEMBER(name, Arguments) void (*name)(const Arguments&, int threads);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_MEMBER)
  RLHF_FAST_MEMBER(float32_product, Float32Product)
#undef RLHF_FAST_MEMBER
};

#define RLHF_FAST_DECLARE(name, Arguments) void name(const Arguments&, int threads);
#define RLHF_FAST_DECLARE_PATH(path_name)            \
  namespace path_name {                              \
  RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)             \
  RLHF_FAST_DECLARE(float32_product, Float32Product) \
  }
RLHF_FAST_DECLARE_PATH(avx512)
RLHF_FAST_DECLARE_PATH(avx2)
RLHF_FAST_DECLARE_PATH(portable)
#undef RLHF_FAST_DECLARE_PATH
#undef RLHF_FAST_DECLARE

// The paths in this build that this processor can run, best first. A nullptr ends the list.
const CpuLaunchers* const* cpu_paths();
// The path in use: the best one, unless choose_cpu_path chose another. That returns false if the path cannot run here.
const CpuLaunchers& cpu();
bool choose_cpu_path(const char* path);

// out (rows, columns) = left (rows, inner) right (columns, inner)^T, from bfloat16 to float32. All last strides are 1.
struct BFloat16Product {
  int64_t rows, columns, inner;
  const uint16_t* left;
  int64_t left_stride;
  const uint16_t* right;
  int64_t right_stride;
  float* out;
  int64_t out_stride;
  int threads;
};
// Whether float32_product computes float32 products, rather than torch: by the processor's maker, not by a trial, so
// that every run gives the same bits. MKL, which torch calls, keeps its best code to Intel's processors, where it is
// near the peak; on AMD's float32_product is as fast or faster on both vector paths.
bool multiplies_float32();

// Whether the chosen path has the instructions for bfloat16_product. If not, it must not be called.
bool multiplies_bfloat16();
// False if there is no memory for the packed columns.
bool bfloat16_product(const BFloat16Product&);

// ---- CUDA's launchers: the same arguments, a scratch and a stream -----------------------------------------------------

// Device memory for intermediate results. A launcher sets `needed` first, and does not launch if `size` is less.
struct Scratch {
  void* data;
  size_t size;
  size_t needed;
};

namespace cuda {
// Returns nullptr, or the text of CUDA's error. No launcher waits for the device.
#define RLHF_FAST_DECLARE(name, Arguments) const char* name(const Arguments&, Scratch&, void* stream);
RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

// Why the kernels cannot run on the current device: CUDA's text, or nullptr.
const char* cannot_run();
}  // namespace cuda

}  // namespace rlhf_fast
