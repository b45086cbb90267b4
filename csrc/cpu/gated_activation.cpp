// activation(gate) * up. The backward recomputes the activation.
//
//   formula         activate() of csrc/formulas.h, in float; one rounding
//   bytes a number  of b bytes: forward 2 b read, b written; backward 3 b read, 2 b written
//   passes          one each way
//   error           a few ulp of float32, before the rounding (tests/ops/test_layers.py)
#include "hidden.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

template <Activation activation>
struct Kind {
  static constexpr Activation value = activation;
};

// Calls `body` with the activation as a compile-time constant, so that the loops do not branch on it.
template <class Body>
void with_kind(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::silu: return body(Kind<Activation::silu>{});
    case Activation::gelu_tanh: return body(Kind<Activation::gelu_tanh>{});
    case Activation::gelu: return body(Kind<Activation::gelu>{});
    case Activation::relu: return body(Kind<Activation::relu>{});
  }
}

// Calls visit(row, i, lanes) for each vector. A task is a block of a row.
template <class Arguments, class Visit>
RLHF_FAST_INLINE void over_rows(const Arguments& a, int threads, const Visit& visit) {
  const int64_t blocks = blocks_of(a.width);
  parallel_for(a.tokens * blocks, smaller(a.width, kBlock), threads, [&](int64_t task) {
    const int64_t row = task / blocks, start = task % blocks * kBlock;
    over_vectors(start, smaller(start + kBlock, a.width),
                 [&](int64_t i, int lanes) __attribute__((always_inline)) { visit(row, i, lanes); });
  });
}

}  // namespace

void gated_activation(const GatedActivation& a, int threads) {
  typed(a.gate.data, a.dtype, [&](auto* data) {
    using T = typename Pointed<decltype(data)>::type;
    with_kind(a.activation, [&](auto kind) {
      over_rows(a, threads, [&](int64_t row, int64_t i, int lanes) __attribute__((always_inline)) {
        const F32 gate = load(row_of<T>(a.gate, row) + i, lanes), up = load(row_of<T>(a.up, row) + i, lanes);
        store(row_of<T>(a.product, row) + i, activate(kind.value, gate).value * up, lanes);
      });
    });
  });
}

void gated_activation_backward(const GatedActivationBackward& a, int threads) {
  typed(a.gate.data, a.dtype, [&](auto* data) {
    using T = typename Pointed<decltype(data)>::type;
    with_kind(a.activation, [&](auto kind) {
      over_rows(a, threads, [&](int64_t row, int64_t i, int lanes) __attribute__((always_inline)) {
        const F32 gate = load(row_of<T>(a.gate, row) + i, lanes), up = load(row_of<T>(a.up, row) + i, lanes);
        const F32 grad = load(row_of<T>(a.grad_product, row) + i, lanes);
        const Activated<F32> activated = activate(kind.value, gate);
        store(row_of<T>(a.grad_gate, row) + i, grad * up * activated.slope, lanes);
        store(row_of<T>(a.grad_up, row) + i, grad * activated.value, lanes);
      });
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
