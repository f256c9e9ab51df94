// The gradient of the balance loss, a warp a token: from the slopes of a token's sequence and two sums over its
// scores.
#pragma once

#include "moe/params.h"
#include "moe/warp.cuh"

namespace dsv3rt {

// The sequence of a token: how many end at or before it.
__device__ __forceinline__ int sequence_of(const int* cu_seqlens, int num_sequences, int64_t token) {
  int sequence = 0;
  for (int first = 0; first < num_sequences; first += 32) {
    const int b = first + lane_idx();
    sequence += __popc(__ballot_sync(~0u, b < num_sequences && cu_seqlens[b + 1] <= token));
  }
  return sequence;
}

template <int kPerLane, int kWidth>
__global__ void __launch_bounds__(32 * kTokenWarps, kPerLane > 8 ? 4 : 6)
    balance_backward_kernel(const __grid_constant__ BalanceBackwardParams params) {
  const int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx();
  if (t >= params.num_tokens) return;
  const int64_t row = t * params.num_experts;
  float score[kPerLane], grad[kPerLane];
  load_row<kWidth>(params.scores + row, params.num_experts, score);
  const float upstream = *params.grad;
  const int begin = params.cu_seqlens[0], sequence = sequence_of(params.cu_seqlens, params.num_sequences, t);
  const bool inside = sequence < params.num_sequences && begin <= t;
  const int64_t slope_row = int64_t(inside ? sequence : 0) * params.num_experts;
  load_row<kWidth>(params.slope + slope_row, inside ? params.num_experts : 0, grad);
  const float inverse = __fdiv_rn(1.0f, row_sum(score) + kSumFloor);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) dot += grad[i] * score[i];
  dot = warp_sum(dot) * inverse;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) grad[i] = inside ? upstream * (grad[i] - dot) * inverse : 0.0f;
  store_row<kWidth>(params.scores_grad + row, params.num_experts, grad);
}

}  // namespace dsv3rt
