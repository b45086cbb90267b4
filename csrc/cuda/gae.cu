// Generalised advantage estimation: a warp takes a sequence, 32 tokens at a time from its end. Its lanes read and write
// side by side; the steps follow each other as in the reference, every lane going through all 32.
#include "scalar.h"

namespace rlhf_fast::cuda {

namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // in a block
constexpr unsigned kAll = 0xffffffff;

__global__ void run_sequences(Gae a) {
  const int64_t sequence = (int64_t)blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (sequence >= a.sequences) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t start = a.cu_seqlens ? a.cu_seqlens[sequence] : sequence * a.length;
  const int64_t stop = a.cu_seqlens ? a.cu_seqlens[sequence + 1] : start + a.length;
  const float gamma = (float)a.gamma, gamma_lam = (float)(a.gamma * a.lam);

  float next_value = 0, next_advantage = 0;
  for (int64_t end = stop; end > start; end -= kWarp) {
    const int64_t t = end - 1 - lane;
    const bool inside = t >= start;
    const bool live = inside && (!a.live || a.live[t]);
    const float reward = live ? a.rewards[t] : 0, value = live ? a.values[t] : 0;
    const unsigned lives = __ballot_sync(kAll, live);
    float advantage = 0;
    for (int step = 0; step < kWarp; step++) {
      const float step_reward = __shfl_sync(kAll, reward, step), step_value = __shfl_sync(kAll, value, step);
      if (!(lives >> step & 1)) continue;
      next_advantage = gae_step(step_reward, step_value, next_value, next_advantage, gamma, gamma_lam);
      next_value = step_value;
      if (step == lane) advantage = next_advantage;
    }
    if (inside) {
      a.advantages[t] = advantage;
      a.returns[t] = advantage + value;
    }
  }
}

}  // namespace

const char* gae(const Gae& a) {
  if (a.whiten) return "gae: whitening on the device comes with the CUDA kernels";
  if (a.sequences == 0) return nullptr;
  const int64_t blocks = (a.sequences + kWarps - 1) / kWarps;
  run_sequences<<<(unsigned)blocks, kWarps * kWarp, 0, (cudaStream_t)a.stream>>>(a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rlhf_fast::cuda
