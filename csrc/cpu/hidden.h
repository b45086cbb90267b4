// Rows of hidden states.
#pragma once

#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_PATH {

template <class T>
RLHF_FAST_INLINE T* row_of(const Hidden& hidden, int64_t row) {
  return (T*)hidden.data + row * hidden.row_stride;
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
