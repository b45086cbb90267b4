// activation(gate) * up. A block takes kStep<T> columns of a row. The backward recomputes the activation.
//
//   formula         activate() of csrc/formulas.h, in float; one rounding
//   bytes a number  of b bytes: forward 2 b read, b written; backward 3 b read, 2 b written
//   passes          one each way
//   error           a few ulp of float32, before the rounding (tests/ops/test_layers.py)
#include "hidden.h"

namespace rlhf_fast::cuda {

namespace {

// The columns of this thread: from i on, of the `left` that remain in the row.
struct Place {
  int64_t row, i, left;
};

template <class T>
__device__ __forceinline__ Place place_in(int64_t width, unsigned steps) {
  const unsigned row = blockIdx.x / steps;
  const int64_t i = (int64_t)(blockIdx.x - row * steps) * kStep<T> + threadIdx.x * kVector<T>;
  return {row, i, width - i};
}

template <class T>
__device__ __forceinline__ Numbers<kVector<T>> load_at(const Hidden& hidden, const Place& place) {
  return load_numbers<kVector<T>>(row_of<T>(hidden, place.row) + place.i, place.left);
}

template <class T>
__global__ void __launch_bounds__(kThreads) multiply(GatedActivation a, unsigned steps) {
  const Place place = place_in<T>(a.width, steps);
  if (place.left <= 0) return;
  const Numbers<kVector<T>> gate = load_at<T>(a.gate, place);
  Numbers<kVector<T>> product = load_at<T>(a.up, place);
#pragma unroll
  for (int k = 0; k < kVector<T>; k++) product.at[k] *= activate(a.activation, gate.at[k]).value;
  store_numbers(row_of<T>(a.product, place.row) + place.i, product, place.left);
}

template <class T>
__global__ void __launch_bounds__(kThreads) differentiate(GatedActivationBackward a, unsigned steps) {
  const Place place = place_in<T>(a.width, steps);
  if (place.left <= 0) return;
  const Numbers<kVector<T>> gate = load_at<T>(a.gate, place), grad = load_at<T>(a.grad_product, place);
  Numbers<kVector<T>> grad_gate = load_at<T>(a.up, place), grad_up;
#pragma unroll
  for (int k = 0; k < kVector<T>; k++) {
    const Activated<float> activated = activate(a.activation, gate.at[k]);
    grad_gate.at[k] = grad.at[k] * grad_gate.at[k] * activated.slope;
    grad_up.at[k] = grad.at[k] * activated.value;
  }
  store_numbers(row_of<T>(a.grad_gate, place.row) + place.i, grad_gate, place.left);
  store_numbers(row_of<T>(a.grad_up, place.row) + place.i, grad_up, place.left);
}

template <class T, class Arguments>
const char* launch_rows(void (*kernel)(Arguments, unsigned), const Arguments& a, void* stream) {
  const int64_t steps = ceil_div(a.width, kStep<T>);
  return launch(kernel, a.tokens * steps, kThreads, 0, stream, a, (unsigned)steps);
}

}  // namespace

const char* gated_activation(const GatedActivation& a, Scratch&, void* stream) {
  return typed(a.dtype, [&](auto kind) { return launch_rows<decltype(kind)>(multiply<decltype(kind)>, a, stream); });
}

const char* gated_activation_backward(const GatedActivationBackward& a, Scratch&, void* stream) {
  return typed(a.dtype,
               [&](auto kind) { return launch_rows<decltype(kind)>(differentiate<decltype(kind)>, a, stream); });
}

}  // namespace rlhf_fast::cuda
