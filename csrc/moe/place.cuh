// Where each choice's row lies: counts of blocks of choices, then, from all of them, the row at which a block's choices
// of an expert begin, and their rank inside the block. Integers alone, so the same choices always get the same rows: in
// the order of (token, k) inside an expert's segment.
#pragma once

#include "common/math.h"
#include "hopper/barrier.cuh"
#include "moe/params.h"

namespace dsv3rt {

constexpr int kPlaceThreads = 1024;
constexpr int kPlaceWarps = kPlaceThreads / 32;

__device__ __forceinline__ int expert_of(const PlaceParams& params, int64_t choice) {
  if (choice >= params.num_choices) return -1;
  const int64_t expert = params.idx[choice];
  return expert >= 0 && expert < params.num_experts ? static_cast<int>(expert) : -1;
}

__global__ void __launch_bounds__(kPlaceThreads) count_choices_kernel(const __grid_constant__ PlaceParams params) {
  __shared__ int counts[kMaxExperts];
  let_next_grid_start();
  if (threadIdx.x < params.num_experts) counts[threadIdx.x] = 0;
  __syncthreads();
  for (int turn = 0; turn < params.turns; ++turn) {
    const int expert = expert_of(params, (int64_t(blockIdx.x) * params.turns + turn) * kPlaceThreads + threadIdx.x);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  if (threadIdx.x < params.num_experts) {
    params.partial[blockIdx.x * params.num_experts + threadIdx.x] = counts[threadIdx.x];
  }
}

struct PlaceStorage {
  int total[kMaxExperts];  // choices of an expert
  int first[kMaxExperts];  // in earlier blocks; then the row where this block's next turn begins
  int warp_rows[kMaxExperts / 32];
  uint16_t before[kPlaceWarps][kMaxExperts];  // choices of an expert in earlier warps
};

// Adds up the counts of all blocks, and of earlier ones.
__device__ __forceinline__ void add_counts(const PlaceParams& params, PlaceStorage& storage) {
  int experts = 32;
  while (experts < params.num_experts) experts *= 2;
  const int expert = threadIdx.x % experts, step = kPlaceThreads / experts;
  int total = 0, earlier = 0;
  if (expert < params.num_experts) {
#pragma unroll 8
    for (int block = threadIdx.x / experts; block < params.num_blocks; block += step) {
      const int count = params.partial[block * params.num_experts + expert];
      total += count;
      earlier += block < static_cast<int>(blockIdx.x) ? count : 0;
    }
    atomicAdd(&storage.total[expert], total);
    atomicAdd(&storage.first[expert], earlier);
  }
}

// Adds the rows of earlier experts to the first rows, and from one block writes counts and offsets.
__device__ __forceinline__ void add_segments(const PlaceParams& params, PlaceStorage& storage) {
  const int expert = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool exists = expert < params.num_experts;
  const int total = exists ? storage.total[expert] : 0;
  const int rows = round_up(total, params.block);
  int end = rows;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(~0u, end, distance);
    if (lane >= distance) end += below;
  }
  if (warp < kMaxExperts / 32 && lane == 31) storage.warp_rows[warp] = end;
  __syncthreads();
  if (warp < kMaxExperts / 32) {
    for (int i = 0; i < warp; ++i) end += storage.warp_rows[i];
  }
  if (!exists) return;
  storage.first[expert] += end - rows;
  if (blockIdx.x > 0) return;
  params.counts[expert] = total;
  params.offsets[expert] = end - rows;
  if (expert == params.num_experts - 1) params.offsets[params.num_experts] = end;
}

// The row of this thread's choice; moves the first rows on by the turn's choices.
__device__ __forceinline__ int64_t next_row(const PlaceParams& params, PlaceStorage& storage, int expert) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = lane; i < params.num_experts; i += 32) storage.before[warp][i] = 0;
  __syncwarp();
  const uint32_t same = __match_any_sync(~0u, expert);
  const int rank = __popc(same & ((1u << lane) - 1));
  if (expert >= 0 && rank == 0) storage.before[warp][expert] = static_cast<uint16_t>(__popc(same));
  __syncthreads();
  int sum = 0;
  if (threadIdx.x < params.num_experts) {
#pragma unroll
    for (int i = 0; i < kPlaceWarps; ++i) {
      const int count = storage.before[i][threadIdx.x];
      storage.before[i][threadIdx.x] = static_cast<uint16_t>(sum);
      sum += count;
    }
  }
  __syncthreads();
  const int64_t row = expert < 0 ? -1 : storage.first[expert] + storage.before[warp][expert] + rank;
  __syncthreads();
  if (threadIdx.x < params.num_experts) storage.first[threadIdx.x] += sum;
  return row;
}

__global__ void __launch_bounds__(kPlaceThreads) assign_rows_kernel(const __grid_constant__ PlaceParams params) {
  __shared__ PlaceStorage storage;
  if (threadIdx.x < kMaxExperts) storage.total[threadIdx.x] = storage.first[threadIdx.x] = 0;
  __syncthreads();
  wait_for_prior_grid();
  add_counts(params, storage);
  __syncthreads();
  add_segments(params, storage);
  __syncthreads();
  for (int turn = 0; turn < params.turns; ++turn) {
    const int64_t choice = (int64_t(blockIdx.x) * params.turns + turn) * kPlaceThreads + threadIdx.x;
    const int64_t row = next_row(params, storage, expert_of(params, choice));
    if (choice < params.num_choices) params.row_of[choice] = row;
  }
}

}  // namespace dsv3rt
