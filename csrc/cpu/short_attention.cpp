// Attention over short sequences whose tokens stand one after the other in a packed row, without padding.
//
//   formula         out_i = sum_j p_ij v_j, p_i = softmax_j(scale q_i k_j) over the j that i attends to.
//                   backward: dv = p^T dout; ds = p (dout v^T - sum_j p dout v^T); dq = scale ds k; dk = scale ds^T q
//   bytes a token   q, k, v read, out written, and a log-sum-exp per head; backward: these read, dout read, dq, dk, dv
//                   written. The scores stay in the scratch of a task: they are computed again in the backward
//   passes          one each way
//   error           that of the float32 products, then one rounding
//
// A task is one sequence and one key head, with all query heads that share it: its products are those of
// float32_product, on copies in float32.
#include <cmath>

#include "parallel.h"

namespace rlhf_fast::RLHF_FAST_PATH {
namespace {

// A factor of a product.
struct Factor {
  const float* data;
  int64_t row_stride, column_stride;
};

void multiply(int64_t rows, int64_t columns, int64_t inner, Factor left, Factor right, float* out, float scale = 1) {
  float32_product({rows, columns, inner, left.data, left.row_stride, left.column_stride, right.data, right.row_stride,
                   right.column_stride, out, columns, scale, false},
                  1);
}

template <class T>
struct Task {
  const ShortAttention& a;
  int64_t start, length, head;  // first token, tokens, key head
  int64_t group = a.heads / a.shared;
  int64_t rows = group * length;                           // of the query heads, one after the other
  int64_t span = (length + kLanes - 1) / kLanes * kLanes;  // keys, with zeros up to a whole vector

  // The rows of `count` heads from `first` on, as (count, length, width) floats.
  void read(const HeadRows& from, int64_t first, int64_t count, int64_t width, float* to) const {
    for (int64_t h = first; h < first + count; h++) {
      for (int64_t t = 0; t < length; t++, to += width) {
        const T* row = (const T*)from.data + (start + t) * from.row_stride + h * from.head_stride;
        over_vectors(0, width, [&](int64_t i, int lanes) { store(to + i, load(row + i, lanes), lanes); });
      }
    }
  }

  void read_keys(const HeadRows& from, int64_t width, float* to) const {
    read(from, head, 1, width, to);
    memset(to + length * width, 0, (span - length) * width * sizeof(float));
  }

  void write(const HeadRows& to, int64_t first, int64_t count, int64_t width, const float* from) const {
    for (int64_t h = first; h < first + count; h++) {
      for (int64_t t = 0; t < length; t++, from += width) {
        T* row = (T*)to.data + (start + t) * to.row_stride + h * to.head_stride;
        over_vectors(0, width, [&](int64_t i, int lanes) { store(row + i, load(from + i, lanes), lanes); });
      }
    }
  }

  float* log_sum(int64_t row) const {
    return a.log_sums + (start + row % length) * a.heads + head * group + row / length;
  }

  // e^(score - shift) of the keys that row attends to; 0 for the others, whatever their score is.
  F32 share(const float* scores, const uint8_t* mask, int64_t j, int lanes, float shift) const {
    return where(load_mask(mask + j, lanes), exp(load(scores + j, lanes) - shift), F32{});
  }

  void softmax(float* scores) const {
    for (int64_t row = 0; row < rows; row++, scores += span) {
      const uint8_t* mask = a.mask + row % length * a.longest;
      F32 tops = all(-3.4e38f), sums{};
      over_vectors(0, length, [&](int64_t j, int lanes) {
        const I32 attends = load_mask(mask + j, lanes);
        tops = larger(where(attends, load(scores + j, lanes), all(-3.4e38f)), tops);
      });
      const float top = largest(tops);
      over_vectors(0, length, [&](int64_t j, int lanes) {
        const F32 x = share(scores, mask, j, lanes, top);
        sums += x;
        store(scores + j, x, lanes);
      });
      const float total = sum(sums);
      over_vectors(0, length, [&](int64_t j, int lanes) { store(scores + j, load(scores + j, lanes) / total, lanes); });
      *log_sum(row) = top + logf(total);
    }
  }

  void forward(float* memory) const {
    float* query = memory;
    float* key = query + rows * a.width;
    float* value = key + span * a.width;
    float* scores = value + span * a.value_width;
    float* out = scores + rows * span;
    read(a.query, head * group, group, a.width, query);
    read_keys(a.key, a.width, key);
    read_keys(a.value, a.value_width, value);
    multiply(rows, span, a.width, {query, a.width, 1}, {key, 1, a.width}, scores, a.scale);
    softmax(scores);
    multiply(rows, a.value_width, span, {scores, span, 1}, {value, a.value_width, 1}, out);
    write(a.out, head * group, group, a.value_width, out);
  }

  void backward(float* memory) const {
    float* query = memory;
    float* key = query + rows * a.width;
    float* value = key + span * a.width;
    float* shares = value + span * a.value_width;
    float* grad_out = shares + rows * span;
    float* grads = grad_out + rows * a.value_width;  // of the shares, then of the scores
    float* out = grads + rows * span;                // a gradient of query, key or value
    read(a.query, head * group, group, a.width, query);
    read_keys(a.key, a.width, key);
    read_keys(a.value, a.value_width, value);
    read(a.grad_out, head * group, group, a.value_width, grad_out);
    // 1. The shares, and what they give the values.
    multiply(rows, span, a.width, {query, a.width, 1}, {key, 1, a.width}, shares, a.scale);
    for (int64_t row = 0; row < rows; row++) {
      float* of_row = shares + row * span;
      const uint8_t* mask = a.mask + row % length * a.longest;
      const float shift = *log_sum(row);
      over_vectors(0, length, [&](int64_t j, int lanes) { store(of_row + j, share(of_row, mask, j, lanes, shift)); });
    }
    multiply(span, a.value_width, rows, {shares, 1, span}, {grad_out, a.value_width, 1}, out);
    write(a.grad_value, head, 1, a.value_width, out);
    // 2. The gradient of the shares, then of the scores.
    multiply(rows, span, a.value_width, {grad_out, a.value_width, 1}, {value, 1, a.value_width}, grads);
    for (int64_t row = 0; row < rows; row++) {
      const float* p = shares + row * span;
      float* grad = grads + row * span;
      F32 sums{};
      for (int64_t j = 0; j < span; j += kLanes) sums += load(p + j) * load(grad + j);
      const float mean = sum(sums);
      for (int64_t j = 0; j < span; j += kLanes) store(grad + j, load(p + j) * (load(grad + j) - mean));
    }
    // 3. What they give query and key.
    multiply(rows, a.width, span, {grads, span, 1}, {key, a.width, 1}, out, a.scale);
    write(a.grad_query, head * group, group, a.width, out);
    multiply(span, a.width, rows, {grads, 1, span}, {query, a.width, 1}, out, a.scale);
    write(a.grad_key, head, 1, a.width, out);
  }
};

}  // namespace

void short_attention(const ShortAttention& a, int threads) {
  typed(a.query.data, a.dtype, [&](auto* data) {
    using T = typename Pointed<decltype(data)>::type;
    parallel_for(threads, kSerialElements, threads, [&](int64_t thread) {
      for (int64_t i = thread; i < a.sequences * a.shared; i += threads) {
        const int64_t sequence = i / a.shared, start = a.starts[sequence];
        const Task<T> task{a, start, a.starts[sequence + 1] - start, i % a.shared};
        float* memory = a.scratch + thread * a.scratch_size;
        a.grad_out.data ? task.backward(memory) : task.forward(memory);
      }
    });
  });
}

}  // namespace rlhf_fast::RLHF_FAST_PATH
