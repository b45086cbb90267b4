// KL(policy || reference) over the whole vocabulary. The forward reads both rows once for their normalisers and once
// more for the terms. The backward reads them once.
//
//   formula         sum_j p_j log(p_j / r_j) - p_j + r_j, no term of which is negative
//   bytes a row     of V columns of b bytes: forward 4 V b read, 20 written; backward 2 V b read, V b written
//   passes          forward two, backward one
//   error           no larger than the naive float32 formula's, both against float64 (tests/ops/test_accuracy.py)
#include "pairs.h"

namespace rlhf_fast::cuda {

namespace {

// The statistics of a row that the backward needs: p_j = e^((x_j - shift) / temperature) * scale, and ref_shift and
// offset for log(r_j / p_j).
struct alignas(16) Statistics {
  float shift, scale, ref_shift, offset;
};
static_assert(sizeof(Statistics) == kStatistics * sizeof(float));

struct Finish {
  ExactKl a;
  SegmentSums swept;
  const float* terms;

  // A row with only -inf has no softmax. Its shift of -inf makes every later result NaN. log(tops + rest) is computed
  // as log1p(tops + rest - 1), which is accurate where a single column has nearly all the probability.
  __device__ Normalisers normalisers(int64_t row, float) const {
    const RowSums p = swept.sums[row], r = swept.sums[a.rows.length + row];
    return {p.shift, 1 / (p.tops + p.rest), r.shift, 1 / (r.tops + r.rest),
            log1pf(p.tops - 1 + p.rest) - log1pf(r.tops - 1 + r.rest)};
  }

  __device__ void operator()(int64_t row, float inverse_temperature, bool writes) const {
    const Normalisers n = normalisers(row, inverse_temperature);
    const float kl = join_terms(terms, swept.segments, row);
    if (writes) write(row, kl, {n.shift, n.scale, n.ref_shift, n.offset});
  }

  __device__ void skip(int64_t row) const { write(row, 0, {}); }

  __device__ void write(int64_t row, float kl, const Statistics& statistics) const {
    a.kl[row] = kl;
    ((Statistics*)a.statistics)[row] = statistics;
  }
};

// The slopes of d KL / d x_j = p_j (log p_j - log r_j - KL) / temperature, times grad_kl.
struct Gradient {
  ExactKlBackward a;

  __device__ RowSlopes operator()(int64_t row, float inverse_temperature, bool) const {
    const Statistics s = ((const Statistics*)a.statistics)[row];
    const float scaled_grad = a.grad_kl[row] * inverse_temperature * s.scale;
    RowSlopes slopes{};
    slopes.shift = s.shift;
    slopes.constant = -scaled_grad * a.kl[row];
    slopes.ref_shift = s.ref_shift;
    slopes.offset = s.offset;
    slopes.ratio_slope = -scaled_grad;
    return slopes;
  }

  __device__ void skip(int64_t) const {}
};

}  // namespace

const char* exact_kl(const ExactKl& a, Scratch& scratch, void* stream) {
  const SegmentSums swept = take_segment_sums(scratch, a.rows, 2);
  float* terms = take<float>(scratch, a.rows.length * swept.segments);
  if (scratch.size < scratch.needed) return nullptr;
  const Finish op{a, swept, terms};
  const char* error = typed(a.logits.dtype, [&](auto kind) {
    using T = decltype(kind);
    const char* error = sum<T>(a.rows, 2, a.logits, a.ref_logits, swept, false, stream);
    return error ? error : sum_kl<T>(a.rows, a.logits, a.ref_logits, terms, swept.segments, op, stream);
  });
  return error ? error : finish(a.rows, op, stream);
}

const char* exact_kl_backward(const ExactKlBackward& a, Scratch&, void* stream) {
  return typed(a.logits.dtype, [&](auto kind) {
    using T = decltype(kind);
    return write_gradient<T, T, true>(a.rows, a.logits, a.ref_logits, a.grad, a.rows.vocab, Gradient{a}, stream);
  });
}

}  // namespace rlhf_fast::cuda
