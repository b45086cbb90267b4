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
__device__ __forceinline__ T* at(const Hidden& hidden, const Place& place) {
  return row_of<T>(hidden, place.row) + place.i;
}

template <class T>
__global__ void __launch_bounds__(kThreads) multiply(GatedActivation a, unsigned steps) {
  const Place place = place_in<T>(a.width, steps);
  if (place.left <= 0) return;
  Numbers<kVector<T>> x[2];
  load_numbers(x, {at<const T>(a.gate, place), at<const T>(a.up, place)}, place.left);
  auto& [gate, product] = x;
#pragma unroll
  for (int k = 0; k < kVector<T>; k++) product.at[k] *= activate(a.activation, gate.at[k]).value;
  store_numbers(at<T>(a.product, place), product, place.left);
}

template <class T>
__global__ void __launch_bounds__(kThreads) differentiate(GatedActivationBackward a, unsigned steps) {
  const Place place = place_in<T>(a.width, steps);
  if (place.left <= 0) return;
  Numbers<kVector<T>> x[3], grad_up;
  load_numbers(x, {at<const T>(a.gate, place), at<const T>(a.grad_product, place), at<const T>(a.up, place)},
               place.left);
  auto& [gate, grad, grad_gate] = x;  // grad_gate: up, until the gradient replaces it
#pragma unroll
  for (int k = 0; k < kVector<T>; k++) {
    const Activated<float> activated = activate(a.activation, gate.at[k]);
    grad_gate.at[k] = grad.at[k] * grad_gate.at[k] * activated.slope;
    grad_up.at[k] = grad.at[k] * activated.value;
  }
  store_numbers(at<T>(a.grad_gate, place), grad_gate, place.left);
  store_numbers(at<T>(a.grad_up, place), grad_up, place.left);
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
