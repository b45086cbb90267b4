// The first sweep (pass over the logits): the log-sum-exp of rows (online softmax), and from it log-prob and entropy.
// The formulas are those of csrc/cpu/rows.h.
//
// A block walks through a row, a segment at a time, and loads the next segment while it sums this one. Each thread adds
// the sums of its columns over the segments, and at the end the threads are joined. Of few rows, each segment has a
// block, which would else leave most multiprocessors idle; the sums of all its threads are stored, and added in the
// same order. So the result of a row depends neither on its position nor on the other rows, nor on their number.
#pragma once

#include "rows.h"

namespace rlhf_fast::cuda {

// Bound of a log-ratio that is multiplied by a probability. Where the probability is 0, the product is 0, not 0 * inf.
constexpr float kFar = 1e4f;

// Sums over all columns except the target, with gap = x - shift. tops + rest is the usual sum of the softmax. Columns
// at the maximum, with e^gap = 1, are counted separately, because 1 + 1e-8 is 1 in float: a row with one large logit
// would lose the sum of all others.
struct alignas(16) RowSums {
  static constexpr int kSums = 3;  // floats after the shift

  float shift;     // the maximum of x
  float tops;      // number of columns with x = shift
  float rest;      // sum of e^(gap / temperature) over the columns with x < shift
  float weighted;  // sum of e^(gap / temperature) * -gap, for the entropy

  // Makes the sums relative to a larger maximum: the rescaling step of the online softmax. The former maximum is below
  // the new shift, so `tops` joins `rest`. Every -gap grows by `rise`.
  __device__ float rescale(float to, float rate) {
    if (!(to > shift)) return 1;
    const float rise = shift > -INFINITY ? to - shift : 0;  // before the first column, shift is -inf: avoids inf - inf
    const float shrink = exp2_flushed(-rise * rate);
    const float total = tops + rest;
    weighted = shrink == 0 ? 0 : shrink * (weighted + rise * total);
    rest = shrink * total;
    tops = 0;
    shift = to;
    return shrink;
  }

  // Adds sums relative to the same shift.
  __device__ void join(const RowSums& other) {
    tops += other.tops;
    rest += other.rest;
    weighted += other.weighted;
  }

  __device__ void add_logit(float) {}
  __device__ void add_square(float) {}
};

// These and the sums for the extras.
struct AllSums : RowSums {
  static constexpr int kSums = 5;

  float squares;  // sum of e^(2 gap / temperature) over the columns with x < shift
  float logits;   // sum of x over all columns, the target's included

  __device__ void rescale(float to, float rate) {
    const float before = tops;
    const float shrink = RowSums::rescale(to, rate);
    if (tops != before) squares += before;
    squares *= shrink * shrink;
  }

  __device__ void join(const AllSums& other) {
    RowSums::join(other);
    squares += other.squares;
    logits += other.logits;
  }

  __device__ void add_logit(float x) { logits += x; }
  __device__ void add_square(float e) { squares += e * e; }
};

template <class Sums>
__device__ __forceinline__ void add(Sums& sums, Sums other, float rate) {
  const float largest = fmaxf(sums.shift, other.shift);
  sums.rescale(largest, rate);
  other.rescale(largest, rate);
  sums.join(other);
}

template <class Sums>
__device__ Sums no_columns() {
  Sums sums{};
  sums.shift = -INFINITY;
  return sums;
}

// The sums of the block's threads, which have one shift. Only the first thread gets them.
template <class Sums>
__device__ inline Sums block_join(Sums sums) {
  __shared__ float of_warps[kWarps][Sums::kSums];
  float* parts = &sums.tops;
#pragma unroll
  for (int k = 0; k < Sums::kSums; k++) {
    parts[k] = warp_sum(parts[k]);
    if (lane_index() == 0) of_warps[warp_index()][k] = parts[k];
  }
  __syncthreads();
  if (threadIdx.x > 0) return sums;
#pragma unroll
  for (int warp = 1; warp < kWarps; warp++) {
#pragma unroll
    for (int k = 0; k < Sums::kSums; k++) parts[k] += of_warps[warp][k];
  }
  return sums;
}

// Adds this thread's columns, relative to `shift`, which is their upper bound. kTop: some may be equal to it.
template <bool kWeighted, bool kTop, class Sums>
__device__ __forceinline__ void add_columns(Sums& sums, const float (&x)[kColumns], float shift, float rate) {
  sums.shift = shift;
  if (shift == -INFINITY) shift = 0;  // all columns are -inf: avoids inf - inf
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const float gap = x[i] - shift;
    const float e = exp2_flushed(gap * rate);
    if (kTop && gap == 0) {
      sums.tops += 1;
    } else {
      sums.rest += e;
      sums.add_square(e);
    }
    if (kWeighted) sums.weighted -= e * fmaxf(gap, -3e38f);  // 0 * -inf would be NaN
  }
}

// The output of the first sweep. A set is one tensor of logits: the policy's and, if there is one, the reference's. A
// row's place is its index in (sets, count).
struct SegmentSums {
  int segments;          // of a row
  RowSums* sums;         // (sets, count); those of dead rows are not written
  float* target_logits;  // (sets, count), after the softcap; not written if the target is out of range
  void* parts;           // (sets, count, segments, kThreads) sums, or nullptr: a block walks through the row
};

// A row of one of the sets, as a block reads it.
template <class T>
struct WalkedRow {
  int64_t row, place;
  const T* data;
  int vocab, target;
  float softcap, inverse_temperature, rate;

  __device__ WalkedRow(const Rows& rows, const Logits& logits, const Logits& ref_logits, int64_t place)
      : row(place < rows.length ? place : place - rows.length), place(place) {
    data = place < rows.length ? row_of<const T>(logits, row) : row_of<const T>(ref_logits, row);
    vocab = (int)rows.vocab, softcap = rows.softcap;
    if (!is_live(rows, row)) return;
    target = target_of(rows, row);
    inverse_temperature = inverse_temperature_of(rows, row);
    rate = kLog2E * inverse_temperature;
  }

  __device__ Loaded<T> load(int segment) const { return issue_loads(data, vocab, segment * kSegment); }

  __device__ void unpack(const Loaded<T>& loaded, int segment, float (&x)[kColumns]) const {
    unpack_columns(loaded, data, vocab, segment * kSegment, x);
    // Else the compiler keeps the words beside the floats, and has too few registers for the next segment.
#pragma unroll
    for (int i = 0; i < kColumns; i++) make_opaque(x[i]);
  }

  // The sums of this thread's columns of a segment, relative to the segment's maximum. Then no exponential exceeds 1.
  template <class Sums, bool kWeighted, bool kCapped>
  __device__ __forceinline__ Sums sums_of(float (&x)[kColumns], int segment, float* target_logits) const {
    // of this segment and of the one before, which a slower thread may still read
    __shared__ float largest[2][kWarps];
    const int start = segment * kSegment;
    Sums sums{};
    cap<kCapped>(x, softcap);
    const bool mixed = is_mixed(start, vocab, target);
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      if (!mixed || column_of<T>(start, i) < vocab) sums.add_logit(x[i]);
    }
    // The target and the columns past the vocabulary become -inf, whose exponential is 0.
    if (mixed) {
#pragma unroll
      for (int i = 0; i < kColumns; i++) {
        const int column = column_of<T>(start, i);
        if (column == target) target_logits[place] = x[i];
        if (column == target || column >= vocab) x[i] = -INFINITY;
      }
    }
    float of_warp = x[0];
#pragma unroll
    for (int i = 1; i < kColumns; i++) of_warp = fmaxf(of_warp, x[i]);
    of_warp = warp_max(of_warp);
    if (lane_index() == 0) largest[segment % 2][warp_index()] = of_warp;
    __syncthreads();
    float shift = largest[segment % 2][0];
#pragma unroll
    for (int warp = 1; warp < kWarps; warp++) shift = fmaxf(shift, largest[segment % 2][warp]);
    // Only the warp with the maximum counts how often it occurs.
    if (of_warp == shift) {
      add_columns<kWeighted, true>(sums, x, shift, rate);
    } else {
      add_columns<kWeighted, false>(sums, x, shift, rate);
    }
    return sums;
  }
};

// The threads have the sums of their columns of the whole row. op(row, place, inverse_temperature, sums, target_logit)
// gets those of the row, in one thread; a row without a target has NaN.
template <class T, class Sums, class Op>
__device__ __forceinline__ void finish_walk(const WalkedRow<T>& row, const Sums& of_thread, const float* target_logits,
                                            const Op& op) {
  const Sums sums = block_join(of_thread);  // its barrier is behind the store of the target's logit
  if (threadIdx.x > 0) return;
  const float target_logit = row.target < 0 ? NAN : *(volatile const float*)(target_logits + row.place);
  op(row.row, row.place, row.inverse_temperature, sums, target_logit);
}

// Blocks per multiprocessor: with 3 x 256 threads each has 80 registers, with 2 x 256, for loads of 128 bytes a thread,
// a tanh per column or more sums, 128.
template <class T, class Sums, bool kCapped>
constexpr int kWalkers = sizeof(T) == 2 && Sums::kSums == RowSums::kSums && !kCapped ? 3 : 2;

// One block a row. op.skip(row) for a dead row.
template <class T, class Sums, bool kWeighted, bool kCapped, class Op>
__global__ void __launch_bounds__(kThreads, kWalkers<T, Sums, kCapped>)
    walk_rows(Rows rows, Logits logits, Logits ref_logits, SegmentSums swept, Op op) {
  const WalkedRow<T> row(rows, logits, ref_logits, blockIdx.x);
  if (!is_live(rows, row.row)) {
    if (threadIdx.x == 0) op.skip(row.row);
    return;
  }
  Sums sums = no_columns<Sums>();
  Loaded<T> next = row.load(0);
#pragma unroll 1
  for (int segment = 0; segment < swept.segments; segment++) {
    float x[kColumns];
    row.unpack(next, segment, x);
    next = row.load(segment + 1);  // past the end it loads nothing
    add(sums, row.template sums_of<Sums, kWeighted, kCapped>(x, segment, swept.target_logits), row.rate);
  }
  finish_walk(row, sums, swept.target_logits, op);
}

// Few rows: one block a segment.
template <class T, class Sums, bool kWeighted, bool kCapped>
__global__ void __launch_bounds__(kThreads, kWalkers<T, Sums, kCapped>)
    sum_segments(Rows rows, Logits logits, Logits ref_logits, SegmentSums swept) {
  const auto [place, segment] = segment_of_block(swept.segments);
  const WalkedRow<T> row(rows, logits, ref_logits, place);
  if (!is_live(rows, row.row)) return;
  float x[kColumns];
  row.unpack(row.load(segment), segment, x);
  ((Sums*)swept.parts)[(int64_t)blockIdx.x * kThreads + threadIdx.x] =
      row.template sums_of<Sums, kWeighted, kCapped>(x, segment, swept.target_logits);
}

// Few rows: one block a row, which adds up the segments.
template <class T, class Sums, class Op>
__global__ void __launch_bounds__(kThreads)
    add_segments(Rows rows, Logits logits, Logits ref_logits, SegmentSums swept, Op op) {
  const WalkedRow<T> row(rows, logits, ref_logits, blockIdx.x);
  if (!is_live(rows, row.row)) {
    if (threadIdx.x == 0) op.skip(row.row);
    return;
  }
  const Sums* parts = (const Sums*)swept.parts + row.place * swept.segments * kThreads + threadIdx.x;
  Sums sums = no_columns<Sums>();
#pragma unroll 4
  for (int segment = 0; segment < swept.segments; segment++) add(sums, parts[segment * kThreads], row.rate);
  finish_walk(row, sums, swept.target_logits, op);
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

// Writes the outputs of a row.
__device__ inline void write_outputs(const RowOutputs& to, int64_t row, const RowResult& result) {
  to.logprobs[row] = result.logprob;
  if (to.entropy) to.entropy[row] = result.entropy;
}

// Writes logsumexp and extras. A row that is NaN is NaN in all of them.
__device__ inline void write_extras(const RowOutputs& to, int64_t row, int64_t vocab, const AllSums& sums,
                                    float target_logit, float inverse_temperature, const RowResult& result) {
  const bool leads = target_logit >= sums.shift, valid = result.logprob == result.logprob;
  const float peak = leads ? target_logit : sums.shift;
  const float above = leads ? -result.logprob : result.statistics.log_norm;  // logsumexp - peak
  // sum of p_j^2: of the target, and of the other columns relative to their largest
  const float target_part = 2 * result.logprob;
  const float others_part = logf(sums.tops + sums.squares) - 2 * result.statistics.log_norm;
  const float gap = fabsf(target_part - others_part);
  to.logsumexp[row] = valid ? peak * inverse_temperature + above : NAN;
  float* extras = to.extras + row * kExtras;
  extras[0] = valid ? sums.logits * inverse_temperature / vocab : NAN;
  extras[1] = valid ? fmaxf(target_part, others_part) + log1pf(expf(-gap)) : NAN;
  extras[2] = leads && valid;
}

__device__ inline void write_no_extras(const RowOutputs& to, int64_t row) {
  to.logsumexp[row] = 0;
#pragma unroll
  for (int k = 0; k < kExtras; k++) to.extras[row * kExtras + k] = 0;
}

// The result of row `row` of set `set`, from the output of the first sweep.
__device__ inline RowResult finish_row(const Rows& rows, const SegmentSums& swept, int64_t row, int set,
                                       float inverse_temperature) {
  const int64_t place = set * rows.length + row;
  const float target_logit = target_of(rows, row) < 0 ? NAN : swept.target_logits[place];
  return finish_row(swept.sums[place], target_logit, inverse_temperature);
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

// Rows below this number leave multiprocessors idle if each has one block, and their parts take little memory.
constexpr int64_t kFewRows = 128;

// The scratch of `sum`. The target's logits go to `target_logits`, or to scratch too.
template <class Sums = RowSums>
SegmentSums take_segment_sums(Scratch& scratch, const Rows& rows, int sets, float* target_logits = nullptr) {
  const int64_t places = sets * rows.length, segments = segments_of(rows.vocab);
  SegmentSums swept{(int)segments, nullptr, target_logits, nullptr};
  if (places < kFewRows) swept.parts = take<Sums>(scratch, places * segments * kThreads);
  if (!target_logits) swept.sums = take<RowSums>(scratch, places), swept.target_logits = take<float>(scratch, places);
  return swept;
}

// Keeps the sums for a later launch.
struct KeepSums {
  RowSums* sums;

  __device__ void operator()(int64_t, int64_t place, float, const RowSums& found, float) const { sums[place] = found; }
  __device__ void skip(int64_t) const {}
};

template <class T, class Sums, bool kWeighted, bool kCapped, class Op>
const char* sum_all(const Rows& rows, int sets, const Logits& logits, const Logits& ref_logits,
                    const SegmentSums& swept, const Op& op, void* stream) {
  const int64_t places = sets * rows.length;
  if (!swept.parts) {
    return launch(walk_rows<T, Sums, kWeighted, kCapped, Op>, places, kThreads, 0, stream, rows, logits, ref_logits,
                  swept, op);
  }
  const char* error = launch(sum_segments<T, Sums, kWeighted, kCapped>, places * swept.segments, kThreads, 0, stream,
                             rows, logits, ref_logits, swept);
  return error ? error
               : launch(add_segments<T, Sums, Op>, places, kThreads, 0, stream, rows, logits, ref_logits, swept, op);
}

// Launches the first sweep over one or two sets of logits of type T. The entropy needs `weighted`. `op` finishes the
// rows: see finish_walk.
template <class T, class Op>
const char* sum(const Rows& rows, int sets, const Logits& logits, const Logits& ref_logits, const SegmentSums& swept,
                bool weighted, const Op& op, void* stream) {
  const auto run = rows.softcap == 0
                       ? weighted ? sum_all<T, RowSums, true, false, Op> : sum_all<T, RowSums, false, false, Op>
                   : weighted ? sum_all<T, RowSums, true, true, Op>
                              : sum_all<T, RowSums, false, true, Op>;
  return run(rows, sets, logits, ref_logits, swept, op, stream);
}

// The same with AllSums, of one set.
template <class T, class Op>
const char* sum_for_extras(const Rows& rows, const Logits& logits, const SegmentSums& swept, const Op& op,
                           void* stream) {
  const auto run = rows.softcap == 0 ? sum_all<T, AllSums, true, false, Op> : sum_all<T, AllSums, true, true, Op>;
  return run(rows, 1, logits, {}, swept, op, stream);
}

template <class T>
const char* sum(const Rows& rows, int sets, const Logits& logits, const Logits& ref_logits, const SegmentSums& swept,
                bool weighted, void* stream) {
  return sum<T>(rows, sets, logits, ref_logits, swept, weighted, KeepSums{swept.sums}, stream);
}

}  // namespace rlhf_fast::cuda
