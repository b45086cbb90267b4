// The emulated module has no CPU engine.
#include "../../../csrc/rlhf_fast.h"

namespace rlhf_fast {
namespace {
const CpuLaunchers nothing{};
const CpuLaunchers* const none[] = {nullptr};
}  // namespace

const CpuLaunchers* const* cpu_paths() { return none; }
const CpuLaunchers& cpu() { return nothing; }
bool choose_cpu_path(const char*) { return false; }
bool multiplies_float32() { return false; }
bool multiplies_bfloat16() { return false; }
bool prefers_bfloat16() { return false; }
bool bfloat16_product(const BFloat16Product&) { return false; }
void pack_bfloat16(const BFloat16Term&, int64_t, uint32_t*, int) {}
}  // namespace rlhf_fast
