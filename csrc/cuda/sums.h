// The first sweep (pass over the logits): the log-sum-exp of rows (online softmax), and from it log-prob and entropy.
// The formulas are those of csrc/cpu/rows.h.
//
// Each block reduces one segment of a row, so that a thousand rows and a single row of 151936 columns both fill the
// GPU. Every kernel that needs the sums of a row combines those of its segments itself, in order. So the result of a
// row depends neither on its position nor on the other rows.
#pragma once

#include "rows.h"

namespace rlhf_fast::cuda {

// Bound of a log-ratio that is multiplied by a probability. Where the probability is 0, the product is 0, not 0 * inf.
constexpr float kFar = 1e4f;

// Sums over all columns except the target, with gap = x - shift. tops + rest is the usual sum of the softmax. Columns
// at the maximum, with e^gap = 1, are counted separately, because 1 + 1e-8 is 1 in float: a row with one large logit
// would lose the sum of all others.
struct alignas(16) RowSums {
  float shift;     // the maximum of x
  float tops;      // number of columns with x = shift
  float rest;      // sum of e^(gap / temperature) over the columns with x < shift
  float weighted;  // sum of e^(gap / temperature) * -gap, for the entropy

  // Makes the sums relative to a larger maximum: the rescaling step of the online softmax. The former maximum is below
  // the new shift, so `tops` joins `rest`. Every -gap grows by `rise`.
  __device__ void rescale(float to, float rate) {
    if (!(to > shift)) return;
    const float rise = shift > -INFINITY ? to - shift : 0;  // before the first column, shift is -inf: avoids inf - inf
    const float shrink = exp2_flushed(-rise * rate);
    const float total = tops + rest;
    weighted = shrink == 0 ? 0 : shrink * (weighted + rise * total);
    rest = shrink * total;
    tops = 0;
    shift = to;
  }

  __device__ void add(RowSums other, float rate) {
    const float largest = fmaxf(shift, other.shift);
    rescale(largest, rate);
    other.rescale(largest, rate);
    tops += other.tops;
    rest += other.rest;
    weighted += other.weighted;
  }
};

__device__ inline RowSums no_columns() { return {-INFINITY, 0, 0, 0}; }

// The sums of all lanes of a warp; every lane gets them.
__device__ inline RowSums warp_join(RowSums sums, float rate) {
  sums.rescale(warp_max(sums.shift), rate);
  sums.tops = warp_sum(sums.tops);
  sums.rest = warp_sum(sums.rest);
  sums.weighted = warp_sum(sums.weighted);
  return sums;
}

// The sums of a thread's columns. They are in registers, so the maximum is found first without a second read. Then no
// exponential exceeds 1.
template <bool kWeighted>
__device__ RowSums thread_sums(const float (&x)[kColumns], float rate) {
  RowSums sums = no_columns();
#pragma unroll
  for (int i = 0; i < kColumns; i++) sums.shift = fmaxf(sums.shift, x[i]);
  const float shift = sums.shift == -INFINITY ? 0 : sums.shift;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const float gap = x[i] - shift;
    const float e = exp2_flushed(gap * rate);
    if (gap == 0) {
      sums.tops += 1;
    } else {
      sums.rest += e;
    }
    if (kWeighted) sums.weighted -= e * fmaxf(gap, -3e38f);  // 0 * -inf would be NaN
  }
  return sums;
}

// The sums of all threads of a block. Only the first warp gets them.
__device__ inline RowSums block_join(RowSums sums, float rate) {
  __shared__ RowSums of_warp[kWarps];
  sums = warp_join(sums, rate);
  if (lane_index() == 0) of_warp[warp_index()] = sums;
  __syncthreads();
  if (warp_index() > 0) return sums;
  return warp_join(lane_index() < kWarps ? of_warp[lane_index()] : no_columns(), rate);
}

// The output of the first sweep. A set is one tensor of logits: the policy's and, if there is one, the reference's.
struct SegmentSums {
  int segments;
  RowSums* sums;         // (sets, count, segments)
  float* target_logits;  // (sets, count), after the softcap; not written if the target is out of range
};

// Writes the sums of each segment of each live row of all sets. 4 blocks per multiprocessor: 64 registers per thread.
template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 4)
    sum_segments(Rows rows, Logits logits, Logits ref_logits, SegmentSums swept) {
  const auto [place, segment] = segment_of_block(swept.segments);  // place: index in (sets, count)
  const bool first = place < rows.length;
  const int64_t row = first ? place : place - rows.length;
  if (!is_live(rows, row)) return;
  const int start = segment * kSegment, vocab = (int)rows.vocab;
  float x[kColumns];
  load_columns(first ? row_of<const T>(logits, row) : row_of<const T>(ref_logits, row), vocab, start, x);
  const int target = target_of(rows, row);
  cap(x, rows.softcap);
  // The target and the columns past the vocabulary become -inf, whose exponential is 0.
  if (is_mixed(start, vocab, target)) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int column = column_of<T>(start, i);
      if (column == target) swept.target_logits[place] = x[i];
      if (column == target || column >= vocab) x[i] = -INFINITY;
    }
  }
  const float rate = kLog2E * inverse_temperature_of(rows, row);
  const RowSums sums = block_join(thread_sums<kWeighted>(x, rate), rate);
  if (threadIdx.x == 0) swept.sums[blockIdx.x] = sums;
}

// Combines the sums of all segments of the row at `place`. A whole warp calls it, and every lane gets the result.
__device__ inline RowSums join_segments(const SegmentSums& swept, int64_t place, float rate) {
  const RowSums* segments = swept.sums + place * swept.segments;
  RowSums sums = no_columns();
  for (int i = lane_index(); i < swept.segments; i += kWarp) sums.add(segments[i], rate);
  return warp_join(sums, rate);
}

struct RowResult {
  RowStatistics statistics;  // with log_norm not bounded by kFar
  float logprob;
  float entropy;  // only if the sums are weighted
};

// With d the log odds against the target (log-sum-exp of the other columns minus the target's logit),
// log p_target = -softplus(d) and 1 - p_target = sigmoid(d).
__device__ inline RowResult finish_row(const RowSums& sums, float target_logit, float inverse_temperature) {
  // 1. The log-sum-exp of the other columns, relative to the shift; 0 if all of them are -inf.
  const bool alone = sums.shift == -INFINITY;
  const bool empty = alone && sums.rest == 0;
  const float total = empty ? 1 : sums.tops + sums.rest;
  const float log_total = empty ? 0 : log1pf(sums.tops - 1 + sums.rest);
  // 2. The log odds. A target at +inf gives NaN, as in the torch reference.
  float d = (sums.shift - target_logit) * inverse_temperature + log_total;
  if (target_logit == INFINITY) d = NAN;
  // 3. Probabilities and softplus from e^-|d| <= 1, which cannot overflow.
  const float certainty = fabsf(d), odds = expf(-certainty), softplus = log1pf(odds);
  const float larger_mass = 1 / (1 + odds), smaller_mass = odds * larger_mass;  // of p_target and 1 - p_target
  const float others_mass = d > 0 ? larger_mass : smaller_mass;
  // 4. entropy = H(p_target, 1 - p_target) + others_mass * H(softmax over the other columns)
  const float binary_entropy = smaller_mass * at_most(certainty, kFar) + softplus;
  const float others_entropy = log_total + sums.weighted * inverse_temperature / total;
  RowResult result;
  result.statistics.shift = alone ? 0 : sums.shift;
  result.statistics.others_mass = others_mass;
  result.statistics.scale = others_mass / total;
  result.statistics.log_norm = log_total + (d < 0 ? -d : 0) + softplus;
  result.logprob = -((d > 0 ? d : 0) + softplus);
  result.entropy = binary_entropy + others_mass * others_entropy;
  return result;
}

// The result of row `row` of set `set`, from the output of the first sweep. A whole warp calls it.
__device__ inline RowResult finish_row(const Rows& rows, const SegmentSums& swept, int64_t row, int set,
                                       float inverse_temperature) {
  const int64_t place = set * rows.length + row;
  const float target_logit = target_of(rows, row) < 0 ? NAN : swept.target_logits[place];
  return finish_row(join_segments(swept, place, kLog2E * inverse_temperature), target_logit, inverse_temperature);
}

// One warp per row. Calls op(row, inverse_temperature, writes) for a live row, where `writes` is true in the one lane
// that writes its outputs, and op.skip(row) for a dead row.
template <class Op>
__global__ void __launch_bounds__(kThreads) finish_rows(Rows rows, Op op) {
  const int64_t row = (int64_t)blockIdx.x * kWarps + warp_index();
  if (row >= rows.length) return;
  const bool writes = lane_index() == 0;
  if (is_live(rows, row)) {
    op(row, inverse_temperature_of(rows, row), writes);
  } else if (writes) {
    op.skip(row);
  }
}

template <class Op>
const char* finish(const Rows& rows, const Op& op, void* stream) {
  return launch(finish_rows<Op>, ceil_div(rows.length, kWarps), kThreads, 0, stream, rows, op);
}

inline SegmentSums take_segment_sums(Scratch& scratch, const Rows& rows, int sets) {
  const int64_t segments = segments_of(rows.vocab);
  return {(int)segments, take<RowSums>(scratch, sets * rows.length * segments),
          take<float>(scratch, sets * rows.length)};
}

// Launches the first sweep over one or two sets of logits of type T. The entropy needs `weighted`.
template <class T>
const char* sum(const Rows& rows, int sets, const Logits& logits, const Logits& ref_logits, const SegmentSums& swept,
                bool weighted, void* stream) {
  return launch(weighted ? sum_segments<T, true> : sum_segments<T, false>, sets * rows.length * swept.segments,
                kThreads, 0, stream, rows, logits, ref_logits, swept);
}

}  // namespace rlhf_fast::cuda
