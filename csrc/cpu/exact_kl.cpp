#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void exact_kl(const ExactKl&) {}
void exact_kl_backward(const ExactKlBackward&) {}

}  // namespace rlhf_fast::RLHF_FAST_PATH
