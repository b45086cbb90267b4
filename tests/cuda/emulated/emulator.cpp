// Runs the blocks of a launch one after another. A thread of a block is a fiber: it has a stack of its own, goes on
// until a barrier or the end of the kernel, and waits there until whomever it waits for has come too.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace rlhf_fast::cuda {
// What csrc/cuda declares `extern __shared__`.
constexpr size_t kSharedBytes = 227 << 10;
extern thread_local uint4 dynamic_shared[];
thread_local uint4 dynamic_shared[kSharedBytes / sizeof(uint4)];
}  // namespace rlhf_fast::cuda

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kWidest = 16;  // bytes that a lane can give

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  jmp_buf context;
  ucontext_t first;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool begun = false;
  State state;
  Place place;
  unsigned mask;
  // Of two exchanges in turn: a lane may be one ahead of who still reads.
  alignas(16) char given[2][kWidest];
  int turn;
};

std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* body;
std::string error;

[[noreturn]] void to_scheduler(int why) { _longjmp(scheduler, why); }

void wait(State state, Place place) {
  current->state = state;
  current->place = place;
  if (!_setjmp(current->context)) to_scheduler(1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    wait(State::done, {"", 0});
  }
}

// Lets a fiber go on until it waits. False where it failed.
bool resume(Fiber& fiber) {
  const int why = _setjmp(scheduler);
  if (why) return why == 1;
  current = &fiber;
  if (fiber.begun) _longjmp(fiber.context, 1);
  fiber.begun = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.get();
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
  setcontext(&fiber.first);
  return false;
}

std::string at(int thread) {
  const Fiber& fiber = *fibers[thread];
  const std::string who = "thread " + std::to_string(thread);
  if (fiber.state == State::done) return who + " has ended";
  return who + " waits at " + fiber.place.file + ":" + std::to_string(fiber.place.line);
}

bool same(Place a, Place b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// Whether all that this lane waits for have come to the same place.
bool warp_is_complete(int thread, int threads) {
  const Fiber& one = *fibers[thread];
  const int first = thread / kWarp * kWarp;
  for (int lane = 0; lane < kWarp; lane++) {
    if (!(one.mask >> lane & 1)) continue;
    if (first + lane >= threads) return false;
    const Fiber& other = *fibers[first + lane];
    if (other.state != State::at_warp_barrier || other.mask != one.mask || !same(other.place, one.place)) return false;
  }
  return true;
}

// Lets waiting threads of a warp go on whose partners have all come. Whether there were any.
bool release_warp(int first, int threads) {
  std::vector<int> free;
  for (int thread = first; thread < first + kWarp && thread < threads; thread++) {
    if (fibers[thread]->state == State::at_warp_barrier && warp_is_complete(thread, threads)) free.push_back(thread);
  }
  for (int thread : free) fibers[thread]->state = State::ready;
  return !free.empty();
}

bool all_at_block_barrier(int threads) {
  for (int thread = 0; thread < threads; thread++) {
    const Fiber& fiber = *fibers[thread];
    if (fiber.state != State::at_block_barrier || !same(fiber.place, fibers[0]->place)) return false;
  }
  return true;
}

// Runs the ready threads of a warp, and what they set free in it.
bool run_warp(int first, int threads, bool backwards) {
  const int last = first + kWarp < threads ? first + kWarp : threads;
  do {
    for (int i = first; i < last; i++) {
      const int thread = backwards ? last - 1 - (i - first) : i;
      if (fibers[thread]->state != State::ready) continue;
      threadIdx = {(unsigned)thread, 0, 0};
      if (!resume(*fibers[thread])) return false;
    }
  } while (release_warp(first, threads));
  return true;
}

bool run_block(int threads, bool backwards) {
  for (int thread = 0; thread < threads; thread++) {
    fibers[thread]->state = State::ready;
    fibers[thread]->turn = 0;
  }
  const int warps = (threads + kWarp - 1) / kWarp;
  for (;;) {
    for (int i = 0; i < warps; i++) {
      if (!run_warp((backwards ? warps - 1 - i : i) * kWarp, threads, backwards)) return false;
    }
    int ended = 0, stuck = 0;
    for (int thread = 0; thread < threads; thread++) {
      if (fibers[thread]->state == State::done) ended++;
      else stuck = thread;
    }
    if (ended == threads) return true;
    if (!all_at_block_barrier(threads)) {
      int other = 0;
      for (int thread = 0; thread < threads; thread++) {
        const Fiber &a = *fibers[thread], &b = *fibers[stuck];
        if (a.state != b.state || a.mask != b.mask || !same(a.place, b.place)) other = thread;
      }
      error = "threads of a block do not meet: " + at(stuck) + ", " + at(other);
      return false;
    }
    for (int thread = 0; thread < threads; thread++) fibers[thread]->state = State::ready;
  }
}

}  // namespace

void fail(Place place, const char* what, ...) {
  char text[256];
  va_list values;
  va_start(values, what);
  vsnprintf(text, sizeof(text), what, values);
  va_end(values);
  error = std::string(place.file) + ":" + std::to_string(place.line) + ": thread " + std::to_string(threadIdx.x) +
          " of block " + std::to_string(blockIdx.x) + ": " + text;
  to_scheduler(2);
}

void block_barrier(Place place) { wait(State::at_block_barrier, place); }

void warp_barrier(Place place, unsigned mask, const void* value, size_t bytes) {
  if (!(mask >> own_lane() & 1)) fail(place, "a lane is not in its own mask %08x", mask);
  current->turn ^= 1;
  current->mask = mask;
  if (bytes) memcpy(current->given[current->turn], value, bytes);
  wait(State::at_warp_barrier, place);
}

const void* lane_value(Place place, unsigned mask, int lane) {
  if (lane < 0 || lane >= kWarp || !(mask >> lane & 1)) fail(place, "lane %d gives nothing to mask %08x", lane, mask);
  return fibers[threadIdx.x / kWarp * kWarp + lane]->given[current->turn];
}

const char* run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  static bool backwards = false;
  const std::lock_guard<std::mutex> lock(one_launch);
  while (fibers.size() < threads.x) fibers.push_back(std::make_unique<Fiber>());
  body = &kernel;
  blockDim = {threads.x, 1, 1};
  gridDim = {blocks.x, 1, 1};
  for (unsigned block = 0; block < blocks.x; block++, backwards = !backwards) {
    blockIdx = {block, 0, 0};
    memset(rlhf_fast::cuda::dynamic_shared, 0xff, shared_bytes);  // NaN
    if (!run_block((int)threads.x, backwards)) {
      for (auto& fiber : fibers) fiber->begun = false;
      return error.c_str();
    }
  }
  return nullptr;
}

}  // namespace emulated

namespace {
std::string last_error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? last_error.c_str() : "invalid configuration argument";
}

extern "C" __attribute__((visibility("default"))) unsigned emulated_launches;
unsigned emulated_launches = 0;

cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  emulated_launches++;
  const dim3 blocks = config.gridDim, threads = config.blockDim;
  if (threads.x == 0 || threads.x > 1024 || blocks.x == 0 || config.dynamicSmemBytes > rlhf_fast::cuda::kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  const char* what = emulated::run(blocks, threads, config.dynamicSmemBytes, kernel);
  if (!what) return cudaSuccess;
  last_error = what;
  return cudaErrorLaunchFailure;
}
