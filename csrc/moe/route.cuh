// The router: a warp takes a token and keeps its scores in registers. Choices are made on integer keys that order like
// the biased scores (NaN above everything), so that a maximum and its lowest index are two warp reductions.
#pragma once

#include "hopper/barrier.cuh"
#include "moe/params.h"
#include "moe/warp.cuh"

namespace dsv3rt {

constexpr uint32_t kMinusInfinityKey = 0x007fffff;  // below it only 0: no expert, or one already taken
constexpr uint32_t kNanKey = ~0u;
constexpr unsigned kMaxRouteBlocks = 528;  // four on each of 132 SMs: fewer blocks, fewer additions to the counts
constexpr int kGroupShift = 20;

// What follows from the numbers of experts and groups.
struct GroupShape {
  int size;             // experts of a group
  int lanes;            // that score a group, a power of two; lanes * groups <= 32
  uint32_t reciprocal;  // e / size == e * reciprocal >> kGroupShift for e < 512: off by less than 512 / 2^20 < 1 / 512
};

__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
  return x != x ? kNanKey : key;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, 1.0f + expf(-x)); }

// The key of the sum of the two best biased scores of group lane / lanes, in all of the group's lanes. `keys` holds the
// token's. Groups start at different steps: their sizes are often a multiple of the 32 banks.
__device__ __forceinline__ uint32_t group_key(const uint32_t* keys, const GroupShape& shape, int num_groups) {
  const int group = lane_idx() / shape.lanes, first_member = lane_idx() % shape.lanes;
  const int num_steps = (shape.size + shape.lanes - 1) / shape.lanes;
  uint32_t best = 0, second = 0;
  if (group < num_groups) {
    int step = group % num_steps;
    for (int i = 0; i < num_steps; ++i) {
      const int member = first_member + shape.lanes * step;
      const uint32_t key = member < shape.size ? keys[group * shape.size + member] : 0;
      second = max(second, min(best, key));
      best = max(best, key);
      step = step + 1 == num_steps ? 0 : step + 1;
    }
  }
  __syncwarp();
  for (int offset = 1; offset < shape.lanes; offset *= 2) {
    const uint32_t other_best = __shfl_xor_sync(~0u, best, offset);
    const uint32_t other_second = __shfl_xor_sync(~0u, second, offset);
    second = max(min(best, other_best), max(second, other_second));
    best = max(best, other_best);
  }
  return key_of(value_of(best) + (shape.size > 1 ? value_of(second) : 0.0f));
}

// Bit group * lanes is set for the groups that a token may use.
__device__ __forceinline__ unsigned kept_groups(uint32_t key, const GroupShape& shape, const RouteParams& params) {
  const int group = lane_idx() / shape.lanes;
  int rank = 0;
  for (int other = 0; other < params.num_groups; ++other) {
    const uint32_t other_key = __shfl_sync(~0u, key, other * shape.lanes);
    rank += other_key > key || (other_key == key && other < group);
  }
  return __ballot_sync(~0u, group < params.num_groups && rank < params.groups_kept);
}

template <int kPerLane>
__device__ __forceinline__ void drop_groups(uint32_t (&key)[kPerLane], uint32_t* keys, const GroupShape& shape,
                                            const RouteParams& params) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[lane_idx() + 32 * i] = key[i];
  __syncwarp();
  const unsigned kept = kept_groups(group_key(keys, shape, params.num_groups), shape, params);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t e = lane_idx() + 32 * i, group = e * shape.reciprocal >> kGroupShift;
    if (e < params.num_experts && !(kept >> (group * shape.lanes) & 1)) key[i] = kMinusInfinityKey;
  }
}

struct Choices {
  int expert;  // of lane k: the k-th choice
  float score;  // of lane k: its unbiased score
  float sum;  // of the scores, added in order; in every lane
};

template <int kPerLane>
__device__ __forceinline__ Choices choose(uint32_t (&key)[kPerLane], const float (&score)[kPerLane], int top_k) {
  Choices chosen{0, 0.0f, 0.0f};
  for (int k = 0; k < top_k; ++k) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (key[i] > best) best = key[i], at = lane_idx() + 32 * i;
    }
    const uint32_t top = __reduce_max_sync(~0u, best);
    const uint32_t candidate = best == top ? at : kMaxExperts;
    const int winner = __reduce_min_sync(~0u, candidate);
    float picked = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (winner == lane_idx() + 32 * i) picked = score[i], key[i] = 0;
    }
    picked = __shfl_sync(~0u, picked, winner % 32);
    chosen.sum += picked;
    if (lane_idx() == k) chosen.expert = winner, chosen.score = picked;
  }
  return chosen;
}

// So that `route_kernel`, which starts beside it, can add.
__global__ void __launch_bounds__(kMaxExperts) clear_counts_kernel(int64_t* counts, int num_experts) {
  let_next_grid_start();
  if (threadIdx.x < num_experts) counts[threadIdx.x] = 0;
}

template <typename Element, int kPerLane>
__global__ void __launch_bounds__(32 * kTokenWarps)
    route_kernel(const __grid_constant__ RouteParams params, const GroupShape shape) {
  __shared__ uint32_t keys[kTokenWarps][32 * kPerLane];
  __shared__ int loads[32 * kPerLane];
  for (int e = threadIdx.x; e < 32 * kPerLane; e += 32 * kTokenWarps) loads[e] = 0;
  __syncthreads();
  float bias[kPerLane];
  load_row(params.bias, params.num_experts, bias);
  const int64_t step = int64_t(gridDim.x) * kTokenWarps;
  for (int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx(); t < params.num_tokens; t += step) {
    float score[kPerLane];
    uint32_t key[kPerLane];
    load_row(static_cast<const Element*>(params.logits) + t * params.num_experts, params.num_experts, score);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      score[i] = sigmoid(score[i]);
      key[i] = lane_idx() + 32 * i < params.num_experts ? key_of(__fadd_rn(score[i], bias[i])) : 0;
    }
    store_row(params.scores + t * params.num_experts, params.num_experts, score);
    if (params.groups_kept < params.num_groups) drop_groups(key, keys[warp_idx()], shape, params);
    const Choices chosen = choose(key, score, params.top_k);
    if (lane_idx() < params.top_k) {
      const float weight = params.renormalize ? __fdiv_rn(chosen.score, chosen.sum + kSumFloor) : chosen.score;
      params.idx[t * params.top_k + lane_idx()] = chosen.expert;
      params.weight[t * params.top_k + lane_idx()] = weight * params.scale;
      atomicAdd(&loads[chosen.expert], 1);
    }
    __syncwarp();
  }
  wait_for_prior_grid();
  __syncthreads();
  for (int e = threadIdx.x; e < params.num_experts; e += 32 * kTokenWarps) {
    if (loads[e] > 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(params.counts + e), static_cast<unsigned long long>(loads[e]));
    }
  }
}

template <typename Element, int kPerLane>
__global__ void __launch_bounds__(32 * kTokenWarps)
    route_backward_kernel(const __grid_constant__ RouteBackwardParams params) {
  const int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx();
  if (t >= params.num_tokens) return;
  const int64_t row = t * params.num_experts;
  float score[kPerLane], grad[kPerLane];
  load_row(params.scores + row, params.num_experts, score);
  if (params.scores_grad != nullptr) {
    load_row(params.scores_grad + row, params.num_experts, grad);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) grad[i] = 0.0f;
  }
  if (params.weight_grad != nullptr) {
    const int expert = choice_of(params.idx, t, params.top_k, params.num_experts);
    const float chosen = expert >= 0 ? params.scores[row + expert] : 0.0f;
    float g = expert >= 0 ? params.weight_grad[t * params.top_k + lane_idx()] : 0.0f;
    if (params.renormalize) {
      const float inverse = __fdiv_rn(1.0f, warp_sum(chosen) + kSumFloor), dot = warp_sum(g * chosen);
      g = (g - dot * inverse) * inverse;
    }
    g *= params.scale;
    for (int k = 0; k < params.top_k; ++k) {
      const int e = __shfl_sync(~0u, expert, k);
      const float g_of_e = __shfl_sync(~0u, g, k);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (e == lane_idx() + 32 * i) grad[i] += g_of_e;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) grad[i] *= (1.0f - score[i]) * score[i];
  store_row(static_cast<Element*>(params.logits_grad) + row, params.num_experts, grad);
}

}  // namespace dsv3rt
