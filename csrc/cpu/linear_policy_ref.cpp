#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void linear_policy_ref(const LinearPolicyRef&) {}

}  // namespace rlhf_fast::RLHF_FAST_PATH
