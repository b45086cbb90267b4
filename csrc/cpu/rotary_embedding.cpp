// Rotary embedding of the pairs (j, j + turned / 2) of a head. `turned` is the number of columns that are rotated, R in
// rlhf_fast/ops/rotary_embedding.py.
//
//   formula         x_j cos_j - x_k sin_j and x_k cos_k + x_j sin_k, k = j + turned / 2, in float; one rounding.
//                   backward: the transpose of that, with -sin_k for sin_j and -sin_j for sin_k
//   bytes a number  of b bytes: b read, b written; and a token's cosines and sines
//   passes          one each way
//   error           1 ulp of float32, before the rounding
#include "hidden.h"

namespace rlhf_fast::RLHF_FAST_PATH {

namespace {

template <class T, class Angle>
void turn(const RotaryEmbedding& a, int threads) {
  const int64_t half = a.turned / 2;
  const float sign = a.backward ? -1 : 1;
  parallel_for(a.sequences * a.length, a.heads * a.width, threads, [&](int64_t i) {
    const int64_t sequence = i / a.length, token = i % a.length;
    const int64_t angle = sequence * a.angles.sequence_stride + token * a.angles.token_stride;
    const Angle* cos = (const Angle*)a.angles.cos + angle;
    const Angle* sin = (const Angle*)a.angles.sin + angle;
    const Angle* sin_of_first = a.backward ? sin + half : sin;
    const Angle* sin_of_second = a.backward ? sin : sin + half;
    const T* x = (const T*)a.x.data + sequence * a.x.sequence_stride + token * a.x.token_stride;
    T* out = (T*)a.out.data + sequence * a.out.sequence_stride + token * a.out.token_stride;
    over_vectors(0, half, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      const F32 first_cos = load(cos + j, lanes), second_cos = load(cos + half + j, lanes);
      const F32 first_sin = sign * load(sin_of_first + j, lanes), second_sin = sign * load(sin_of_second + j, lanes);
      for (int64_t head = 0; head < a.heads; head++) {
        const T* from = x + head * a.x.head_stride + j;
        T* to = out + head * a.out.head_stride + j;
        const F32 first = load(from, lanes), second = load(from + half, lanes);
        store(to, first * first_cos - second * first_sin, lanes);
        store(to + half, second * second_cos + first * second_sin, lanes);
      }
    });
    if (a.width == a.turned) return;
    for (int64_t head = 0; head < a.heads; head++) {
      memcpy(out + head * a.out.head_stride + a.turned, x + head * a.x.head_stride + a.turned,
             (a.width - a.turned) * sizeof(T));
    }
  });
}

}  // namespace

void rotary_embedding(const RotaryEmbedding& a, int threads) {
  typed(a.x.data, a.dtype, [&](auto* data) {
    using T = typename Pointed<decltype(data)>::type;
    if (a.angles.dtype == a.dtype) {
      turn<T, T>(a, threads);
    } else {
      turn<T, float>(a, threads);
    }
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
