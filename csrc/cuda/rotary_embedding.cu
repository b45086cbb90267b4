// Rotary embedding of the pairs (j, j + turned / 2) of a head. `turned` is the number of columns that are rotated, R in
// rlhf_fast/ops/rotary_embedding.py. A block takes a token. A thread rotates kVector<T> pairs of a head at a time, or
// copies kVector<T> of the other columns.
//
//   formula         x_j cos_j - x_k sin_j and x_k cos_k + x_j sin_k, k = j + turned / 2, in float; one rounding.
//                   backward: the transpose of that, with -sin_k for sin_j and -sin_j for sin_k
//   bytes a number  of b bytes: b read, b written; and a token's cosines and sines
//   passes          one each way
//   error           1 ulp of float32, before the rounding
#include "hidden.h"

namespace rlhf_fast::cuda {

namespace {

template <class T, class Angle>
__global__ void __launch_bounds__(kThreads) turn(RotaryEmbedding a) {
  constexpr int kCount = kVector<T>;
  const int64_t sequence = blockIdx.x / a.length, token = blockIdx.x - sequence * a.length;
  const int64_t half = a.turned / 2;
  const int64_t angle = sequence * a.angles.sequence_stride + token * a.angles.token_stride;
  const Angle* cos = (const Angle*)a.angles.cos + angle;
  const Angle* sin = (const Angle*)a.angles.sin + angle;
  const Angle* sin_of_first = a.backward ? sin + half : sin;
  const Angle* sin_of_second = a.backward ? sin : sin + half;
  const float sign = a.backward ? -1 : 1;
  const T* from = (const T*)a.x.data + sequence * a.x.sequence_stride + token * a.x.token_stride;
  T* to = (T*)a.out.data + sequence * a.out.sequence_stride + token * a.out.token_stride;
  const int turning = (int)ceil_div(half, kCount), copying = (int)ceil_div(a.width - a.turned, kCount);
  const int groups = turning + copying;
  for (int64_t group = threadIdx.x; group < a.heads * groups; group += blockDim.x) {
    const int64_t head = group / groups;
    const int of_head = (int)(group - head * groups);
    const T* x = from + head * a.x.head_stride;
    T* out = to + head * a.out.head_stride;
    if (of_head < turning) {
      const int64_t j = of_head * kCount, left = half - j;
      Numbers<kCount> halves[2], angles[4];
      load_numbers(halves, {x + j, x + half + j}, left);
      load_numbers(angles, {cos + j, cos + half + j, sin_of_first + j, sin_of_second + j}, left);
      const auto& [x_first, x_second] = halves;
      const auto& [first_cos, second_cos, first_sin, second_sin] = angles;
      Numbers<kCount> first, second;
#pragma unroll
      for (int k = 0; k < kCount; k++) {
        first.at[k] = x_first.at[k] * first_cos.at[k] - x_second.at[k] * (sign * first_sin.at[k]);
        second.at[k] = x_second.at[k] * second_cos.at[k] + x_first.at[k] * (sign * second_sin.at[k]);
      }
      store_numbers(out + j, first, left);
      store_numbers(out + half + j, second, left);
    } else {
      const int64_t j = a.turned + (of_head - turning) * kCount, left = a.width - j;
      store_numbers(out + j, load_numbers<kCount>(x + j, left), left);
    }
  }
}

}  // namespace

const char* rotary_embedding(const RotaryEmbedding& a, Scratch&, void* stream) {
  return typed(a.dtype, [&](auto kind) {
    using T = decltype(kind);
    const int64_t groups = a.heads * (ceil_div(a.turned / 2, kVector<T>) + ceil_div(a.width - a.turned, kVector<T>));
    const int threads = (int)smaller(larger(ceil_div(groups, kWarp), (int64_t)1) * kWarp, (int64_t)kThreads);
    auto* kernel = a.angles.dtype == a.dtype ? turn<T, T> : turn<T, float>;
    return launch(kernel, a.sequences * a.length, threads, 0, stream, a);
  });
}

}  // namespace rlhf_fast::cuda
