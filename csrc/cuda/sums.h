// The sums of rows of logits in one sweep, and what they say of the target, with the formulas of csrc/cpu/rows.h.
//
// A row is cut into segments, and a block sums one: a thousand rows and a single one of 151936 columns both fill the
// chip. Whoever needs the row's sums joins its segments' in their order. So a row's result depends neither on its place
// nor on the rows beside it.
#pragma once

#include "rows.h"

namespace rlhf_fast::cuda {

constexpr float kLog2E = 1.44269504f;

// Stands for an infinite log-ratio where it meets a probability that has underflowed to 0, so that 0 * inf is 0.
constexpr float kFar = 1e4f;

__device__ inline float at_most(float x, float bound) { return x > bound ? bound : x; }  // NaN stays

// Over the columns other than the target, with gap = x - shift. The largest columns, whose e^gap is 1, are counted
// apart: next to a 1, a float has no digits left for a tail of 1e-8.
struct alignas(16) RowSums {
  float shift;     // the largest
  float tops;      // columns with it
  float rest;      // sum of e^(gap / temperature) over the others
  float weighted;  // sum of e^(gap / temperature) * -gap, where asked for

  // By another shift, which is no smaller.
  __device__ void lower(float to, float rate) {
    if (!(to > shift)) return;
    const float rise = shift > -INFINITY ? to - shift : 0;
    const float shrink = exp2_flushed(-rise * rate);
    const float total = tops + rest;
    weighted = shrink == 0 ? 0 : shrink * (weighted + rise * total);
    rest = shrink * total;
    tops = 0;
    shift = to;
  }

  __device__ void add(RowSums other, float rate) {
    const float largest = fmaxf(shift, other.shift);
    lower(largest, rate);
    other.lower(largest, rate);
    tops += other.tops;
    rest += other.rest;
    weighted += other.weighted;
  }
};

__device__ inline RowSums no_columns() { return {-INFINITY, 0, 0, 0}; }

// Of the warp's lanes; every lane has it.
__device__ inline RowSums warp_join(RowSums sums, float rate) {
  sums.lower(warp_max(sums.shift), rate);
  sums.tops = warp_sum(sums.tops);
  sums.rest = warp_sum(sums.rest);
  sums.weighted = warp_sum(sums.weighted);
  return sums;
}

// A thread's own columns.
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
    if (kWeighted) sums.weighted -= e * fmaxf(gap, -3e38f);  // -inf would make it NaN
  }
  return sums;
}

// Of the block's threads, in its first warp.
__device__ inline RowSums block_join(RowSums sums, float rate) {
  __shared__ RowSums of_warp[kWarps];
  sums = warp_join(sums, rate);
  if (lane_index() == 0) of_warp[warp_index()] = sums;
  __syncthreads();
  if (warp_index() > 0) return sums;
  return warp_join(lane_index() < kWarps ? of_warp[lane_index()] : no_columns(), rate);
}

// What the first sweep leaves of each of one or two sets of logits.
struct SegmentSums {
  int segments;
  RowSums* sums;         // (sets, count, segments)
  float* target_logits;  // (sets, count), after the softcap; nothing where the target is out of range
};

// The segments of every live row of both sets.
template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, 4)  // blocks of a processor at once
    sum_segments(Rows rows, Logits logits, Logits ref_logits, SegmentSums swept) {
  const auto [place, segment] = segment_of_block(swept.segments);  // in (sets, count), and in its row
  const bool first = place < rows.length;
  const int64_t row = first ? place : place - rows.length;
  if (!is_live(rows, row)) return;
  const int start = segment * kSegment, vocab = (int)rows.vocab;
  float x[kColumns];
  load_columns(first ? row_of<const T>(logits, row) : row_of<const T>(ref_logits, row), vocab, start, x);
  const int target = target_of(rows, row);
  cap(x, rows.softcap);
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

// Of the whole row at `place`; a warp asks, every lane has it.
__device__ inline RowSums join_segments(const SegmentSums& swept, int64_t place, float rate) {
  const RowSums* segments = swept.sums + place * swept.segments;
  RowSums sums = no_columns();
  for (int i = lane_index(); i < swept.segments; i += kWarp) sums.add(segments[i], rate);
  return warp_join(sums, rate);
}

struct RowResult {
  RowStatistics statistics;  // its log_norm unbounded
  float logprob;
  float entropy;  // where the sums are weighted
};

// d = log odds against the target: logsumexp of the others minus the target's logit.
__device__ inline RowResult finish_row(const RowSums& sums, float target_logit, float inverse_temperature) {
  const bool alone = sums.shift == -INFINITY;
  const bool empty = alone && sums.rest == 0;
  const float total = empty ? 1 : sums.tops + sums.rest;
  const float log_total = empty ? 0 : log1pf(sums.tops - 1 + sums.rest);
  float d = (sums.shift - target_logit) * inverse_temperature + log_total;
  if (target_logit == INFINITY) d = NAN;
  const float certainty = fabsf(d), odds = expf(-certainty), softplus = log1pf(odds);
  const float likelier = 1 / (1 + odds), unlikelier = odds * likelier;  // of the target and the others
  const float mass = d > 0 ? likelier : unlikelier;
  const float split = unlikelier * at_most(certainty, kFar) + softplus;
  const float spread = log_total + sums.weighted * inverse_temperature / total;
  RowResult result;
  result.statistics.shift = alone ? 0 : sums.shift;
  result.statistics.others_mass = mass;
  result.statistics.scale = mass / total;
  result.statistics.log_norm = log_total + (d < 0 ? -d : 0) + softplus;
  result.logprob = -((d > 0 ? d : 0) + softplus);
  result.entropy = split + mass * spread;
  return result;
}

// Of the row `row` in the set `set`, from what the sweep left.
__device__ inline RowResult finish_row(const Rows& rows, const SegmentSums& swept, int64_t row, int set,
                                       float inverse_temperature) {
  const int64_t place = set * rows.length + row;
  const float target_logit = target_of(rows, row) < 0 ? NAN : swept.target_logits[place];
  return finish_row(join_segments(swept, place, kLog2E * inverse_temperature), target_logit, inverse_temperature);
}

// Calls op(row, inverse_temperature, writes) with a warp for each live row, one lane of which writes the row's outputs,
// and op.skip(row) for the others.
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

// The first sweep, over one or two sets of logits of T; `weighted` is what an entropy needs.
template <class T>
const char* sum(const Rows& rows, int sets, const Logits& logits, const Logits& ref_logits, const SegmentSums& swept,
                bool weighted, void* stream) {
  return launch(weighted ? sum_segments<T, true> : sum_segments<T, false>, sets * rows.length * swept.segments,
                kThreads, 0, stream, rows, logits, ref_logits, swept);
}

}  // namespace rlhf_fast::cuda
