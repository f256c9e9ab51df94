// What compute-sanitizer's racecheck makes of named barriers, in kernels so small that they are seen to have no race
// (docs/notes/sanitizer.md). Built with nvcc -std=c++20 -arch=sm_90a -Icsrc -lineinfo; run as
//
//   compute-sanitizer --tool racecheck ./racecheck_named_barriers KERNEL
//
// KERNEL: `pairs`, warps that trade numbers two and two, as the groups of FP8 decoding do; `pairs_by_block`, the same
// with the block's barrier; `groups`, groups that meet as often as each has rows and then the whole block, as the
// norm's backward does; `equal_groups`, the same where all groups have equally many; `groups_by_block`, these by the
// block's barrier.
#include <cstdio>
#include <cstring>

#include "hopper/barrier.cuh"

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <bool kNamed>
__global__ void pairs(int* out) {
  __shared__ int traded[kThreads];
  const int warp = threadIdx.x / 32, pair = warp % (kWarps / 2);
  const auto meet = [&] {
    if constexpr (kNamed) {
      dsv3rt::named_barrier_sync(1 + pair, 64);
    } else {
      __syncthreads();
    }
  };
  int value = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    traded[threadIdx.x] = value;
    meet();
    value += traded[threadIdx.x ^ (kThreads / 2)];
    meet();
  }
  out[threadIdx.x] = value;
}

// kMore: rows that the second group has beyond the first.
template <bool kNamed, int kMore>
__global__ void groups(int* out) {
  __shared__ int parts[kWarps], sums[kThreads];
  const int group = threadIdx.x / (kThreads / 2);
  int value = 0;
  for (int row = 0; row < 3 + kMore * group; ++row) {
    sums[threadIdx.x] = row;  // only this thread reads it
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = row;
    if constexpr (kNamed) {
      dsv3rt::named_barrier_sync(1 + group, kThreads / 2);
    } else {
      __syncthreads();
    }
    value += parts[group * (kWarps / 2) + row % (kWarps / 2)] + sums[threadIdx.x];
    if constexpr (kNamed) {
      dsv3rt::named_barrier_sync(1 + group, kThreads / 2);
    } else {
      __syncthreads();
    }
  }
  __syncthreads();
  sums[kThreads - 1 - threadIdx.x] = value;
  __syncthreads();
  out[threadIdx.x] = sums[threadIdx.x];
}

bool run(void (*kernel)(int*)) {
  int *out = nullptr, host[kThreads];
  if (cudaMalloc(&out, sizeof(host)) != cudaSuccess) return false;
  kernel<<<1, kThreads>>>(out);
  const bool ran = cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost) == cudaSuccess;
  int sum = 0;
  for (const int value : host) sum = sum * 31 + value;
  std::printf("%s, hash %d\n", ran ? "ran" : "failed", sum);
  return ran;
}

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc == 2 ? argv[1] : "";
  if (std::strcmp(name, "pairs") == 0) return !run(pairs<true>);
  if (std::strcmp(name, "pairs_by_block") == 0) return !run(pairs<false>);
  if (std::strcmp(name, "groups") == 0) return !run(groups<true, 2>);
  if (std::strcmp(name, "equal_groups") == 0) return !run(groups<true, 0>);
  if (std::strcmp(name, "groups_by_block") == 0) return !run(groups<false, 0>);
  std::fprintf(stderr,
               "racecheck_named_barriers: the kernel must be pairs, pairs_by_block, groups, equal_groups or "
               "groups_by_block\n");
  return 2;
}
