// Every launcher of the compiled engine, with its arguments as records.h has them. Nothing here knows torch or Python.
#pragma once

#include <cstddef>

#include "records.h"

namespace rlhf_fast {

// What the backward of a row needs, as the kStatistics floats of its statistics.
struct RowStatistics {
  float shift;        // the largest other logit, after the softcap, before the temperature
  float others_mass;  // 1 - p_target
  float scale;        // p_j = e^((x_j - shift) / temperature) * scale
  float log_norm;     // log p_j = (x_j - shift) / temperature - log_norm
};

static_assert(sizeof(RowStatistics) == kStatistics * sizeof(float));

// ---- the launchers: the CPU's, compiled once for each instruction set, and CUDA's ------------------------------------

struct CpuLaunchers {
  const char* path;  // "avx512", "avx2" or "portable"
#define RLHF_FAST_MEMBER(name, Arguments) void (*name)(const Arguments&, int threads);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_MEMBER)
#undef RLHF_FAST_MEMBER
};

#define RLHF_FAST_DECLARE(name, Arguments) void name(const Arguments&, int threads);
#define RLHF_FAST_DECLARE_PATH(path_name) \
  namespace path_name {                   \
  extern const CpuLaunchers launchers;    \
  RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)  \
  }
RLHF_FAST_DECLARE_PATH(avx512)
RLHF_FAST_DECLARE_PATH(avx2)
RLHF_FAST_DECLARE_PATH(portable)
#undef RLHF_FAST_DECLARE_PATH
#undef RLHF_FAST_DECLARE

// The paths that this build holds and this processor can run, best first; a nullptr ends the list.
const CpuLaunchers* const* cpu_paths();
// The chosen one, the best unless `choose_cpu_path` named another. False where that one cannot run here.
const CpuLaunchers& cpu();
bool choose_cpu_path(const char* path);

// out (rows, columns) = left (rows, inner) right (columns, inner)^T, from bfloat16 to float32. The inner stride is 1.
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
// Whether the chosen path has the instructions for it; without, bfloat16_product must not be called.
bool multiplies_bfloat16();
// False when memory for its packed columns could not be had.
bool bfloat16_product(const BFloat16Product&);

// ---- CUDA: the same arguments, and a stream ---------------------------------------------------------------------------

// Memory of the device for what a launch finds on its way. A launcher first sets `needed`; where `size` is less it
// returns without a launch.
struct Scratch {
  void* data;
  size_t size;
  size_t needed;
};

namespace cuda {
// nullptr or the text of CUDA's error. Nothing waits for the device.
#define RLHF_FAST_DECLARE(name, Arguments) const char* name(const Arguments&, Scratch&, void* stream);
RLHF_FAST_LAUNCHERS(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE

// Why the kernels cannot run on the current device: CUDA's text, or nullptr.
const char* cannot_run();
}  // namespace cuda

}  // namespace rlhf_fast
