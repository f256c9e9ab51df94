// The gradient of the router's logits, a warp a token. Its row passes through shared memory, where the chosen experts
// are found by their index.
#pragma once

#include "moe/params.h"
#include "moe/warp.cuh"

namespace dsv3rt {

// Adds lane k's gradient to that of its choice, -1 for none. Twins, which `route` never chooses, take turns.
__device__ __forceinline__ void add_to_choices(float* row, int expert, float grad) {
  const bool chosen = expert >= 0;
  const unsigned same = __match_any_sync(~0u, expert);
  const bool first = __ffs(same) - 1 == lane_idx();
  if (__all_sync(~0u, first || !chosen)) {
    if (chosen) row[expert] += grad;
  } else {
    for (int k = 0; k < kMaxTopK; ++k) {
      if (chosen && lane_idx() == k) row[expert] += grad;
      __syncwarp();
    }
  }
  __syncwarp();
}

template <typename Element, int kPerLane, int kWidth>
__global__ void __launch_bounds__(32 * kTokenWarps, kPerLane > 8 ? 3 : 5)
    route_backward_kernel(const __grid_constant__ RouteBackwardParams params) {
  alignas(16) __shared__ float rows[kTokenWarps][32 * kPerLane];
  const int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx();
  if (t >= params.num_tokens) return;
  float* row = rows[warp_idx()];
  const int64_t first = t * params.num_experts;
  float score[kPerLane], grad[kPerLane] = {};
  load_row<kWidth>(params.scores + first, params.num_experts, score);
  if (params.scores_grad != nullptr) load_row<kWidth>(params.scores_grad + first, params.num_experts, grad);
  const int expert = choice_of(params.idx, t, params.top_k, params.num_experts);
  float g = lane_idx() < params.top_k ? params.weight_grad[t * params.top_k + lane_idx()] : 0.0f;
  store_row<kWidth>(row, 32 * kPerLane, score);
  __syncwarp();
  const float chosen = expert >= 0 ? row[expert] : 0.0f;
  if (expert < 0) g = 0.0f;
  if (params.renormalize) {
    const float inverse = __fdiv_rn(1.0f, warp_sum(chosen) + kSumFloor), dot = warp_sum(g * chosen);
    g = (g - dot * inverse) * inverse;
  }
  __syncwarp();
  store_row<kWidth>(row, 32 * kPerLane, grad);
  __syncwarp();
  add_to_choices(row, expert, g * params.scale);
  load_row<kWidth>(row, 32 * kPerLane, grad);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) grad[i] *= (1.0f - score[i]) * score[i];
  store_row<kWidth>(static_cast<Element*>(params.logits_grad) + first, params.num_experts, grad);
}

}  // namespace dsv3rt
