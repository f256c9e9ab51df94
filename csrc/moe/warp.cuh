// What kernels with a warp a token share: lane l holds the experts l, l + 32, ...
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dsv3rt {

constexpr int kTokenWarps = 8;  // of a block

__device__ __forceinline__ int lane_idx() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_idx() { return threadIdx.x / 32; }

// The same order every time, and the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// A row of E numbers, zero past its end.
template <int kPerLane, typename Element>
__device__ __forceinline__ void load_row(const Element* row, int num_experts, float (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane_idx() + 32 * i;
    x[i] = expert < num_experts ? static_cast<float>(row[expert]) : 0.0f;
  }
}

template <int kPerLane, typename Element>
__device__ __forceinline__ void store_row(Element* row, int num_experts, const float (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane_idx() + 32 * i;
    if (expert < num_experts) row[expert] = static_cast<Element>(x[i]);
  }
}

template <int kPerLane>
__device__ __forceinline__ float row_sum(const float (&x)[kPerLane]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += x[i];
  return warp_sum(sum);
}

// Lane k's choice of a token, -1 where there is none or it names no expert.
__device__ __forceinline__ int choice_of(const int64_t* idx, int64_t token, int top_k, int num_experts) {
  if (lane_idx() >= top_k) return -1;
  const int64_t expert = idx[token * top_k + lane_idx()];
  return expert >= 0 && expert < num_experts ? static_cast<int>(expert) : -1;
}

}  // namespace dsv3rt
