// KL(policy || reference) over the whole vocabulary. The forward reads both rows for their normalisers, and a second
// time, mostly from the cache, for the terms. The backward reads them once.
//
//   formula         sum_j p_j log(p_j / r_j) - p_j + r_j, no term of which is negative
//   bytes a row     of V columns of b bytes: forward 4 V b read, 20 written; backward 2 V b read, V b written
//   passes          forward two, backward one
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "pairs.h"

namespace rlhf_fast::RLHF_FAST_PATH {
namespace {

// The statistics of a row that the backward needs.
struct Statistics {
  Normaliser policy;
  float ref_shift, offset;
};
static_assert(sizeof(Statistics) == kStatistics * sizeof(float));

// A row with only -inf has no softmax. Its shift of -inf makes every later result NaN.
Normaliser normaliser_of(const RowSums& sums) { return {sums.shift, (float)(1 / sums.total())}; }

}  // namespace

void exact_kl(const ExactKl& a, int threads) {
  typed(a.logits.data, a.logits.dtype, [&](auto* logits) {
    using T = std::remove_pointer_t<decltype(logits)>;
    parallel_for(a.rows.length, 2 * a.rows.vocab, threads, [&](int64_t i) {
      float kl = 0;
      Statistics s{};
      if (is_live(a.rows, i)) {
        const float inverse_temperature = inverse_temperature_of(a.rows, i);
        const Row policy(row_of<T>(a.logits, i), a.rows.vocab, -1, 0);
        const Row reference(row_of<T>(a.ref_logits, i), a.rows.vocab, -1, 0);
        // The normalisers of both rows, then the terms of the KL.
        const RowSums sums = sum_row<kLogprob>(policy, inverse_temperature);
        const RowSums ref_sums = sum_row<kLogprob>(reference, inverse_temperature);
        const Normaliser p = normaliser_of(sums), r = normaliser_of(ref_sums);
        s = {p, r.shift, (float)(sums.log_total() - ref_sums.log_total())};
        kl = (float)Pair(policy, reference, p, r, s.offset, inverse_temperature).kl();
      }
      a.kl[i] = kl;
      memcpy(a.statistics + i * kStatistics, &s, sizeof(s));
    });
  });
}

// d KL / d x_j = p_j (log p_j - log r_j - KL) / temperature
void exact_kl_backward(const ExactKlBackward& a, int threads) {
  typed(a.logits.data, a.logits.dtype, [&](auto* logits) {
    using T = std::remove_pointer_t<decltype(logits)>;
    if (a.grad.data != a.logits.data) write_in_huge_pages((T*)a.grad.data, a.rows.length * a.grad.row_stride);
    parallel_for(a.rows.length, 2 * a.rows.vocab, threads, [&](int64_t i) {
      T* grad = row_of<T>(a.grad, i);
      if (!is_live(a.rows, i)) return zero(grad, a.rows.vocab);
      const float inverse_temperature = inverse_temperature_of(a.rows, i);
      const Row policy(row_of<T>(a.logits, i), a.rows.vocab, -1, 0);
      const Row reference(row_of<T>(a.ref_logits, i), a.rows.vocab, -1, 0);
      Statistics s;
      memcpy(&s, a.statistics + i * kStatistics, sizeof(s));
      const float slope = a.grad_kl[i] * inverse_temperature;
      const Normaliser r = {s.ref_shift, 0};  // no scale: the gradient needs log(r_j / p_j), but not r_j
      Pair(policy, reference, s.policy, r, s.offset, inverse_temperature)
          .write_gradient(-slope * a.kl[i], 0, -slope, grad);
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
