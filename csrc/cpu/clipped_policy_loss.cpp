#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void clipped_policy_loss(const ClippedPolicyLoss&) {}

}  // namespace rlhf_fast::RLHF_FAST_PATH
