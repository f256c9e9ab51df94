// Where each choice's row lies: counts of blocks of choices, their prefix sums, then the rank inside a block. Integers
// alone, so the same choices always get the same rows: in the order of (token, k) inside an expert's segment.
#pragma once

#include "common/math.h"
#include "moe/params.h"

namespace dsv3rt {

constexpr int kPlaceWarps = kPlaceChoices / 32;
constexpr int kScanBatch = 16;

__device__ __forceinline__ int expert_of(const PlaceParams& params, int64_t choice) {
  if (choice >= params.num_choices) return -1;
  const int64_t expert = params.idx[choice];
  return expert >= 0 && expert < params.num_experts ? static_cast<int>(expert) : -1;
}

__global__ void __launch_bounds__(kPlaceChoices) count_choices_kernel(const __grid_constant__ PlaceParams params) {
  __shared__ int counts[kMaxExperts];
  if (threadIdx.x < params.num_experts) counts[threadIdx.x] = 0;
  __syncthreads();
  const int expert = expert_of(params, int64_t(blockIdx.x) * kPlaceChoices + threadIdx.x);
  if (expert >= 0) atomicAdd(&counts[expert], 1);
  __syncthreads();
  if (threadIdx.x < params.num_experts) {
    params.partial[int64_t(blockIdx.x) * params.num_experts + threadIdx.x] = counts[threadIdx.x];
  }
}

// One block, a thread an expert: counts of blocks become the rows at which their choices begin.
__global__ void __launch_bounds__(kMaxExperts) scan_choices_kernel(const __grid_constant__ PlaceParams params) {
  __shared__ int ends[kMaxExperts];
  const int expert = threadIdx.x, num_experts = params.num_experts;
  const bool exists = expert < num_experts;
  const int num_blocks = static_cast<int>(ceil_div(params.num_choices, int64_t(kPlaceChoices)));
  int total = 0;
  if (exists) {
#pragma unroll 8
    for (int block = 0; block < num_blocks; ++block) total += params.partial[int64_t(block) * num_experts + expert];
  }
  ends[expert] = exists ? round_up(total, params.block) : 0;
  __syncthreads();
  for (int distance = 1; distance < kMaxExperts; distance *= 2) {
    const int below = expert >= distance ? ends[expert - distance] : 0;
    __syncthreads();
    ends[expert] += below;
    __syncthreads();
  }
  if (!exists) return;
  int row = expert == 0 ? 0 : ends[expert - 1];
  params.counts[expert] = total;
  params.offsets[expert] = row;
  if (expert == num_experts - 1) params.offsets[num_experts] = ends[expert];
  for (int first = 0; first < num_blocks; first += kScanBatch) {
    int counts[kScanBatch];  // all loaded before the first is overwritten
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      const int block = first + i;
      counts[i] = block < num_blocks ? params.partial[int64_t(block) * num_experts + expert] : 0;
    }
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      if (first + i < num_blocks) params.partial[int64_t(first + i) * num_experts + expert] = row;
      row += counts[i];
    }
  }
}

__global__ void __launch_bounds__(kPlaceChoices) assign_rows_kernel(const __grid_constant__ PlaceParams params) {
  __shared__ uint16_t before[kPlaceWarps][kMaxExperts];  // choices of an expert in earlier warps
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = lane; i < params.num_experts; i += 32) before[warp][i] = 0;
  __syncwarp();
  const int64_t choice = int64_t(blockIdx.x) * kPlaceChoices + threadIdx.x;
  const int expert = expert_of(params, choice);
  const uint32_t same = __match_any_sync(~0u, expert);
  const int rank = __popc(same & ((1u << lane) - 1));
  if (expert >= 0 && rank == 0) before[warp][expert] = static_cast<uint16_t>(__popc(same));
  __syncthreads();
  if (threadIdx.x < params.num_experts) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kPlaceWarps; ++i) {
      const int count = before[i][threadIdx.x];
      before[i][threadIdx.x] = static_cast<uint16_t>(sum);
      sum += count;
    }
  }
  __syncthreads();
  if (choice >= params.num_choices) return;
  int64_t row = -1;
  if (expert >= 0) {
    row = params.partial[int64_t(blockIdx.x) * params.num_experts + expert] + before[warp][expert] + rank;
  }
  params.row_of[choice] = row;
}

}  // namespace dsv3rt
