// Kernels for tests/cuda/test_emulated.py: what an emulated launch does, and what it must not pass over.
#include <cstdio>
#include <cstring>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kAll = 0xffffffff;
constexpr int kThreads = 64;

void sum(float* out) {
  __shared__ float parts[2];
  float x = (float)threadIdx.x;
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = parts[0] + parts[1];
}

void half_a_warp(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffff, (float)threadIdx.x, 3);
}

void no_barrier(float* out) {
  __shared__ float given;
  if (threadIdx.x == 0) given = (float)blockIdx.x;
  out[blockIdx.x * kThreads + threadIdx.x] = given;
}

void some_at_a_barrier(float*) {
  if (threadIdx.x < 40) __syncthreads();
}

void at_two_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void part_of_a_warp(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

void a_lane_that_gives_nothing(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, 1.0f, 20);
}

void misaligned(float* out) { __stcg((float4*)(out + 1), make_float4(0, 0, 0, 0)); }

struct Case {
  const char* name;
  void (*kernel)(float*);
};
const Case kCases[] = {
    {"sum", sum},
    {"half_a_warp", half_a_warp},
    {"no_barrier", no_barrier},
    {"some_at_a_barrier", some_at_a_barrier},
    {"at_two_barriers", at_two_barriers},
    {"part_of_a_warp", part_of_a_warp},
    {"a_lane_that_gives_nothing", a_lane_that_gives_nothing},
    {"misaligned", misaligned},
};

}  // namespace

// Prints what the kernel stored, 8 numbers of each block's threads, or the launch's error.
int main(int, char** arguments) {
  alignas(16) static float out[2 * kThreads];
  for (const Case& one : kCases) {
    if (strcmp(one.name, arguments[1]) != 0) continue;
    cudaLaunchConfig_t config{dim3(2), dim3(kThreads), 0, nullptr};
    const cudaError_t error = cudaLaunchKernelEx(&config, one.kernel, (float*)out);
    if (error) return puts(cudaGetErrorString(error)), 0;
    for (float x : out) printf("%g ", x);
    // the next launch is as good as new
    if (cudaLaunchKernelEx(&config, sum, (float*)out) || out[0] != 2016) puts("broken");
  }
}
