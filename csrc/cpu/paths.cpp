// Holds the launchers of each compiled path, and chooses the path: the best one that the processor supports, unless
// another is chosen by name.
#include <cstring>

#include "../rlhf_fast.h"

namespace rlhf_fast {

#define RLHF_FAST_ENTRY(name, Arguments) &name,
#define RLHF_FAST_TABLE(path)                                                                                       \
  namespace path {                                                                                                  \
  const CpuLaunchers launchers = {#path, RLHF_FAST_LAUNCHERS(RLHF_FAST_ENTRY) & float32_product, &short_attention}; \
  }
RLHF_FAST_TABLE(portable)
#ifdef RLHF_FAST_X86
RLHF_FAST_TABLE(avx2)
RLHF_FAST_TABLE(avx512)
#endif

namespace {

#ifdef RLHF_FAST_X86
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool made_by_amd() {
#ifdef RLHF_FAST_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

struct Paths {
  const CpuLaunchers* list[4] = {};
  const CpuLaunchers* chosen = nullptr;

  Paths() {
    int count = 0;
#ifdef RLHF_FAST_X86
    if (has_avx512()) list[count++] = &avx512::launchers;
    if (has_avx2()) list[count++] = &avx2::launchers;
#endif
    list[count++] = &portable::launchers;
    chosen = list[0];
  }
};

Paths& paths() {
  static Paths instance;
  return instance;
}

}  // namespace

const CpuLaunchers* const* cpu_paths() { return paths().list; }

const CpuLaunchers& cpu() { return *paths().chosen; }

bool multiplies_bfloat16() {
#ifdef RLHF_FAST_BFLOAT16
  return paths().chosen == &avx512::launchers && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool multiplies_float32() { return made_by_amd(); }

bool prefers_bfloat16() { return made_by_amd() && multiplies_bfloat16(); }

bool choose_cpu_path(const char* path) {
  for (const CpuLaunchers* const* candidate = paths().list; *candidate; candidate++) {
    if (strcmp((*candidate)->path, path) == 0) {
      paths().chosen = *candidate;
      return true;
    }
  }
  return false;
}

}  // namespace rlhf_fast
