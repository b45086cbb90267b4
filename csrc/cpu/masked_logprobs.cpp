// log softmax(logits)[target] and the entropy. The forward reads the logits once and saves four numbers per row. The
// backward reads the logits once and writes the gradient, which may overwrite them.
//
//   formula         log p_t = -softplus(d), d = logsumexp_{j != t} x_j - x_t (rlhf_fast/ops/_vocab.py)
//   bytes a row     of V columns of b bytes: forward V b read, 20 to 24 written; backward V b read, V b written
//   passes          one each way
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "rows.h"

namespace rlhf_fast::RLHF_FAST_PATH {

void masked_logprobs(const MaskedLogprobs& a, int threads) {
  typed(a.logits.data, a.logits.dtype, [&](auto* logits) {
    using T = std::remove_pointer_t<decltype(logits)>;
    parallel_for(a.rows.length, a.rows.vocab, threads, [&](int64_t i) {
      RowResult result{};  // a dead row is not read, and gives 0
      if (is_live(a.rows, i)) {
        const Row row(row_of<T>(a.logits, i), a.rows.vocab, a.rows.targets[i], a.rows.softcap);
        result = evaluate_row(row, inverse_temperature_of(a.rows, i), wanted_of(a.outputs));
      }
      write_outputs(a.outputs, i, result);
      memcpy(a.statistics + i * kStatistics, &result.statistics, sizeof(RowStatistics));
    });
  });
}

void masked_logprobs_backward(const MaskedLogprobsBackward& a, int threads) {
  typed(a.logits.data, a.logits.dtype, [&](auto* logits) {
    using T = std::remove_pointer_t<decltype(logits)>;
    if (a.grad.data != a.logits.data) write_in_huge_pages((T*)a.grad.data, a.rows.length * a.grad.row_stride);
    parallel_for(a.rows.length, a.columns, threads, [&](int64_t i) {
      T* grad = row_of<T>(a.grad, i);
      if (!is_live(a.rows, i)) return zero(grad, a.columns);
      zero(grad + a.rows.vocab, a.columns - a.rows.vocab);
      const Row row(row_of<T>(a.logits, i), a.rows.vocab, a.rows.targets[i], a.rows.softcap);
      RowStatistics statistics;
      memcpy(&statistics, a.statistics + i * kStatistics, sizeof(RowStatistics));
      write_row_gradient(
          row, a.rows.targets[i], row.target_logit(), statistics, inverse_temperature_of(a.rows, i), a.logprobs[i],
          number_or_0(a.entropy, i),
          {number_or_0(a.grad_logprobs, i), number_or_0(a.grad_entropy, i), number_or_0(a.grad_logsumexp, i)}, grad);
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
