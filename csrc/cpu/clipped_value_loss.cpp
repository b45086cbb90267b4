#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void clipped_value_loss(const ClippedValueLoss&) {}

}  // namespace rlhf_fast::RLHF_FAST_PATH
