// The folds of the ops with an lm head: a tile of float32 logits, fresh from its matrix product, gives the log-probs of
// its rows and becomes their gradient, in place or narrower elsewhere. A block of the gradient's sweep joins its row's
// sums by itself, so that a fold takes two launches, and three where the KL needs a sweep between.
#pragma once

#include "gradients.h"

namespace rlhf_fast::cuda {

// The rows' outputs, and the gradient where it is wanted.
template <bool kPair, class Op>
const char* end_fold(const Rows& rows, const Logits& logits, const Logits& ref_logits, const Logits& grad, const Op& op,
                     void* stream) {
  if (!grad.data) return finish(rows, op, stream);
  return typed(grad.dtype, [&](auto kind) {
    return write_gradient<float, decltype(kind), kPair>(rows, logits, ref_logits, grad, rows.vocab, op, stream);
  });
}

}  // namespace rlhf_fast::cuda
