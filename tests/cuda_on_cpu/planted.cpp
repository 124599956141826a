// Small kernels, each with a mistake that the simulator or a sanitizer has to find, and without it.
// planted NAME right|wrong prints whether the result is as it should be; with no arguments, the names.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3;

// Reverses a block's numbers.
template <bool Wrong>
__global__ void missing_barrier(const float* x, float* y) {
  ATTNEXT_SHARED(float, tile);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  tile[t] = x[first + t];
  if (!Wrong) __syncthreads();
  y[first + t] = tile[kThreads - 1 - t];
}

// Largest number, then the sum, by the same buffer of one number a warp.
template <bool Wrong>
__global__ void reused_buffer(const float* x, float* y) {
  ATTNEXT_SHARED(float, of_warp);
  const int t = threadIdx.x, warp = t / warpSize;
  const float mine = x[blockIdx.x * kThreads + t];
  float largest = mine, sum = mine;
  for (int lanes = 1; lanes < warpSize; lanes *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    sum += __shfl_xor_sync(~0u, sum, lanes);
  }
  if (t % warpSize == 0) of_warp[warp] = largest;
  __syncthreads();
  largest = fmaxf(of_warp[0], of_warp[1]);
  if (Wrong)
    __syncwarp();
  else
    __syncthreads();
  if (t % warpSize == 0) of_warp[warp] = sum;
  __syncthreads();
  y[blockIdx.x * kThreads + t] = largest + of_warp[0] + of_warp[1];
}

template <bool Wrong>
__global__ void out_of_bounds(const float* x, float* y) {
  ATTNEXT_SHARED(float, tile);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  float* mine = tile + t + (Wrong ? 1 : 0);
  *mine = x[first + t];
  y[first + t] = *mine;
}

// The other threads leave without it.
template <bool Wrong>
__global__ void divergent_barrier(const float* x, float* y) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  y[i] = x[i];
  if (!Wrong || t < 24) __syncthreads();
}

template <bool Wrong>
__global__ void different_barriers(const float* x, float* y) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  if (Wrong && t < 24) __syncthreads();
  y[i] = x[i];
  if (!Wrong || t >= 24) __syncthreads();
}

__device__ void copy_number(float* to, const float* from) {
  __pipeline_memcpy_async(to, from, sizeof(float));
  __pipeline_commit();
}

template <bool Wrong>
__global__ void missing_copy_wait(const float* x, float* y) {
  ATTNEXT_SHARED(float, tile);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  copy_number(tile + t, x + first + t);
  if (!Wrong) __pipeline_wait_prior(0);
  __syncthreads();
  y[first + t] = tile[kThreads - 1 - t];
}

// Of two groups the first is needed; the wait leaves one on its way, or both.
template <bool Wrong>
__global__ void copy_wait_too_short(const float* x, float* y) {
  ATTNEXT_SHARED(float, tile);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  copy_number(tile + t, x + first + t);
  copy_number(tile + kThreads + t, x + first + t);
  __pipeline_wait_prior(Wrong ? 2 : 1);
  __syncthreads();
  y[first + t] = tile[kThreads - 1 - t];
  __pipeline_wait_prior(0);
}

template <bool Wrong>
__global__ void race_between_blocks(const float* x, float* y) {
  if (threadIdx.x != blockIdx.x) return;
  if (Wrong)
    y[0] += x[blockIdx.x];
  else
    atomicAdd(y, x[blockIdx.x]);
}

// A barrier orders the threads of one block, and nothing between two.
template <bool Wrong>
__global__ void race_across_barriers(const float* x, float* y) {
  if (blockIdx.x == 0 && threadIdx.x == 0) y[0] = x[0];
  __syncthreads();
  if (Wrong && blockIdx.x == 1 && threadIdx.x == 1) y[1] = y[0];
}

// The last block to come adds what each has written: an atomic without fences orders no other access.
template <bool Wrong>
__global__ void missing_fence(const float* x, float* y) {
  if (threadIdx.x != 0) return;
  float* parts = y + 1;
  parts[blockIdx.x] = x[blockIdx.x];
  if (!Wrong) __threadfence();
  unsigned* come = reinterpret_cast<unsigned*>(y + 1 + kBlocks);
  if (atomicAdd(come, 1) != kBlocks - 1) return;
  if (!Wrong) __threadfence();
  for (int i = 0; i < kBlocks; ++i) y[0] += parts[i];
}

template <bool Wrong>
__global__ void missing_syncwarp(const float* x, float* y) {
  ATTNEXT_SHARED(float, tile);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  tile[t] = x[first + t];
  if (!Wrong) __syncwarp();
  y[first + t] = tile[t ^ 1];
}

template <bool Wrong>
__global__ void exited_lanes(const float* x, float* y) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  if (t % warpSize >= 16) return;
  y[i] = __shfl_xor_sync(Wrong ? ~0u : 0xffffu, x[i], 1);
}

template <bool Wrong>
__global__ void unnamed_caller(const float* x, float* y) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = __shfl_xor_sync(Wrong ? ~1u : ~0u, x[i], 1);
}

template <bool Wrong>
__global__ void unnamed_source(const float* x, float* y) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  const unsigned half = t % warpSize < 16 ? 0xffffu : 0xffff0000u;
  y[i] = __shfl_xor_sync(half, x[i], Wrong ? 16 : 8);
}

template <bool Wrong>
__global__ void different_primitives(const float* x, float* y) {
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  y[i] = Wrong && t % 2 ? __shfl_up_sync(~0u, x[i], 1) : __shfl_xor_sync(~0u, x[i], 1);
}

template <bool Wrong>
__global__ void misaligned_copy(const float* x, float* y) {
  ATTNEXT_SHARED(float, tile);
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  if (t == 0) __pipeline_memcpy_async(tile, x + (Wrong ? 1 : 0), 4 * sizeof(float));
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[i] = x[i];
}

__global__ void nothing() {}

using Numbers = std::vector<float>;

bool anything(const Numbers&, const Numbers&) { return true; }
bool reversed(const Numbers& x, const Numbers& y) {
  for (int i = 0; i < kBlocks * kThreads; ++i)
    if (y[i] != x[i / kThreads * kThreads + kThreads - 1 - i % kThreads]) return false;
  return true;
}
template <int lanes>
bool exchanged(const Numbers& x, const Numbers& y) {
  for (int i = 0; i < kBlocks * kThreads; ++i)
    if (y[i] != x[i ^ lanes]) return false;
  return true;
}
bool largest_plus_sum(const Numbers& x, const Numbers& y) {
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    const auto first = x.begin() + i / kThreads * kThreads, last = first + kThreads;
    if (y[i] != *std::max_element(first, last) + std::accumulate(first, last, 0.f)) return false;
  }
  return true;
}
bool sum_of_first(const Numbers& x, const Numbers& y) {
  return y[0] == std::accumulate(x.begin(), x.begin() + kBlocks, 0.f);
}

struct Case {
  const char* name;
  void (*launch)(bool wrong, const float* x, float* y);
  bool (*check)(const Numbers& x, const Numbers& y);
};

// `numbers` of shared memory, no more.
#define LAUNCH(kernel, numbers)                                                                               \
  [](bool wrong, const float* x, float* y) {                                                                  \
    if (wrong)                                                                                                \
      ATTNEXT_LAUNCH(kernel<true>, dim3(kBlocks), dim3(kThreads), (numbers) * sizeof(float), nullptr, x, y);  \
    else                                                                                                      \
      ATTNEXT_LAUNCH(kernel<false>, dim3(kBlocks), dim3(kThreads), (numbers) * sizeof(float), nullptr, x, y); \
  }

void launch_with_shared_memory(bool wrong, const float*, float*) {
  ATTNEXT_LAUNCH(nothing, dim3(1), dim3(1), (wrong ? 228 : 227) << 10, nullptr);
}
void launch_deep_block(bool wrong, const float*, float*) {
  ATTNEXT_LAUNCH(nothing, dim3(1), dim3(1, 1, wrong ? 65 : 64), 0, nullptr);
}

const Case kCases[] = {
    {"missing_barrier", LAUNCH(missing_barrier, kThreads), reversed},
    {"reused_buffer", LAUNCH(reused_buffer, 2), largest_plus_sum},
    {"out_of_bounds", LAUNCH(out_of_bounds, kThreads), exchanged<0>},
    {"divergent_barrier", LAUNCH(divergent_barrier, 0), exchanged<0>},
    {"different_barriers", LAUNCH(different_barriers, 0), exchanged<0>},
    {"missing_copy_wait", LAUNCH(missing_copy_wait, kThreads), reversed},
    {"copy_wait_too_short", LAUNCH(copy_wait_too_short, 2 * kThreads), reversed},
    {"misaligned_copy", LAUNCH(misaligned_copy, 4), exchanged<0>},
    {"race_between_blocks", LAUNCH(race_between_blocks, 0), sum_of_first},
    {"race_across_barriers", LAUNCH(race_across_barriers, 0), anything},
    {"missing_fence", LAUNCH(missing_fence, 0), sum_of_first},
    {"missing_syncwarp", LAUNCH(missing_syncwarp, kThreads), exchanged<1>},
    {"exited_lanes", LAUNCH(exited_lanes, 0), anything},
    {"unnamed_caller", LAUNCH(unnamed_caller, 0), exchanged<1>},
    {"unnamed_source", LAUNCH(unnamed_source, 0), exchanged<8>},
    {"different_primitives", LAUNCH(different_primitives, 0), exchanged<1>},
    {"shared_memory", launch_with_shared_memory, anything},
    {"configuration", launch_deep_block, anything},
};

}  // namespace

// Runs the kernel of that name without its mistake or with it: 1 where the result is right, 0 where not, -1 without
// such a kernel.
extern "C" int run_planted(const char* name, int wrong) {
  for (const Case& planted : kCases) {
    if (std::strcmp(planted.name, name) != 0) continue;
    Numbers x(kBlocks * kThreads), y(kBlocks * kThreads);
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(1 + i % 37);
    planted.launch(wrong, x.data(), y.data());
    return planted.check(x, y);
  }
  return -1;
}

int main(int count, char** arguments) {
  if (count != 3) {
    for (const Case& planted : kCases) std::printf("%s\n", planted.name);
    return 0;
  }
  const int right = run_planted(arguments[1], !std::strcmp(arguments[2], "wrong"));
  std::puts(right > 0 ? "right result" : right ? "no such kernel" : "wrong result");
  return right > 0 ? 0 : 1;
}
