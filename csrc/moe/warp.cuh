// What kernels with a warp a token share.
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

// Which experts of a row a lane holds: kWidth neighbours, then as many 32 * kWidth further on. With four of them,
// which E must then be a multiple of, 16 bytes of FP32 are an access and a warp's lie side by side.
template <int kWidth>
__device__ __forceinline__ int expert_of(int i) {
  return (i / kWidth * 32 + lane_idx()) * kWidth + i % kWidth;
}

template <typename Element, int kWidth>
struct alignas(kWidth * sizeof(Element)) Neighbours {
  Element elements[kWidth];
};

// A lane's numbers of a row of E, zero past its end. place(i), for every kWidth-th i: where i and its neighbours lie.
template <int kWidth, int kPerLane, typename Element, typename Place>
__device__ __forceinline__ void load_lane(const Element* row, int num_experts, float (&x)[kPerLane], Place place) {
  static_assert(kPerLane % kWidth == 0);
#pragma unroll
  for (int i = 0; i < kPerLane; i += kWidth) {
    const int expert = place(i);
    Neighbours<Element, kWidth> loaded{};
    if (expert < num_experts) loaded = *reinterpret_cast<const Neighbours<Element, kWidth>*>(row + expert);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[i + j] = static_cast<float>(loaded.elements[j]);
  }
}

template <int kWidth, int kPerLane, typename Element, typename Place>
__device__ __forceinline__ void store_lane(Element* row, int num_experts, const float (&x)[kPerLane], Place place) {
#pragma unroll
  for (int i = 0; i < kPerLane; i += kWidth) {
    const int expert = place(i);
    Neighbours<Element, kWidth> stored;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) stored.elements[j] = static_cast<Element>(x[i + j]);
    if (expert < num_experts) *reinterpret_cast<Neighbours<Element, kWidth>*>(row + expert) = stored;
  }
}

template <int kWidth, int kPerLane, typename Element>
__device__ __forceinline__ void load_row(const Element* row, int num_experts, float (&x)[kPerLane]) {
  load_lane<kWidth>(row, num_experts, x, expert_of<kWidth>);
}

template <int kWidth, int kPerLane, typename Element>
__device__ __forceinline__ void store_row(Element* row, int num_experts, const float (&x)[kPerLane]) {
  store_lane<kWidth>(row, num_experts, x, expert_of<kWidth>);
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
