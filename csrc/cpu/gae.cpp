#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void gae(const Gae&) {}

}  // namespace rlhf_fast::RLHF_FAST_PATH
