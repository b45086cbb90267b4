// linear_logprobs and linear_cross_entropy: the fold of a chunk of logits (rlhf_fast/ops/_sweep.py). Computes the
// log-probs of each row, then overwrites its logits with the gradient. A row is read twice, the second time mostly from
// the cache.
//
//   formula         as masked_logprobs; the gradient is p_j times a factor of the row, except at the target
//   bytes a row     of V columns: 4 V read for the sums, 4 V read and at most 4 V written for the gradient
//   passes          one, and one more for the gradient
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "rows.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void linear_logprobs(const LinearLogprobs& a, int threads) {
  parallel_for(a.rows.length, a.rows.vocab, threads, [&](int64_t i) {
    float* data = row_of<float>(a.logits, i);
    const Row row(data, a.rows.vocab, a.rows.targets[i], a.rows.softcap);
    const float inverse_temperature = inverse_temperature_of(a.rows, i);
    // 1. The results. The target's logit is read first, because the gradient may overwrite it.
    const float target_logit = row.target_logit();
    const Wanted wanted = wanted_of(a.outputs);
    const RowResult result = evaluate_row(row, inverse_temperature, a.grad_entropy && !wanted ? kEntropy : wanted);
    write_outputs(a.outputs, i, result);
    // 2. The gradient.
    if (!a.grad.data) return;
    typed(a.grad.data, a.grad.dtype, [&](auto* grads) {
      auto* grad = grads + i * a.grad.row_stride;
      write_row_gradient(
          row, a.rows.targets[i], target_logit, result.statistics, inverse_temperature, result.logprob, result.entropy,
          {a.grad_logprobs ? a.grad_logprobs[i] : 1, number_or_0(a.grad_entropy, i), number_or_0(a.grad_logsumexp, i)},
          grad);
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
