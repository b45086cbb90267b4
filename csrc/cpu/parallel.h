// Loops over threads and over vectors. OpenMP decides which thread runs a task. The split into tasks depends only on
// the sizes, so a result does not depend on the number of threads.
#pragma once

#include "vec.h"

namespace rlhf_fast::RLHF_FAST_PATH {

// Starting the threads costs a few microseconds. Work with fewer elements than this runs on the calling thread.
constexpr int64_t kSerialElements = 16384;

// Runs task(i) for i in [0, tasks), each about `elements` elements of work.
template <class Task>
RLHF_FAST_INLINE void parallel_for(int64_t tasks, int64_t elements, int threads, const Task& task) {
  if (threads <= 1 || tasks <= 1 || tasks * elements <= kSerialElements) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  // Threads take several small tasks at a time, which reduces the scheduling overhead.
  const int64_t batch = elements >= kSerialElements ? 1 : kSerialElements / (elements > 0 ? elements : 1);
#pragma omp parallel for num_threads(threads) schedule(dynamic, batch)
  for (int64_t i = 0; i < tasks; i++) task(i);
}

// Calls visit(i, lanes) for each vector of [start, end): whole vectors, then one with the remaining lanes.
template <class Visit>
RLHF_FAST_INLINE void over_vectors(int64_t start, int64_t end, const Visit& visit) {
  for (; start + kLanes <= end; start += kLanes) visit(start, kLanes);
  if (start < end) visit(start, (int)(end - start));
}

// Tokens of one task and of one partial sum in the token-level ops. Several arrays of this length fit in the L1 cache.
constexpr int64_t kBlock = 1024;

RLHF_FAST_INLINE int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

}  // namespace rlhf_fast::RLHF_FAST_PATH
