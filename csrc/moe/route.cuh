// Routing: a warp takes a token. Experts lie striped over the lanes, so that loads and stores are whole lines.
#pragma once

#include <cuda_bf16.h>

#include "moe/params.h"

namespace dsv3rt {

constexpr int kRouteWarps = 8;
constexpr int kExpertsALane = kMaxExperts / 32;

// Unsigned integers in the order of the floats, all above zero: zero stands for an expert that is out.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Bit g: group g, whose score is the sum of its two best biased scores, is among the best `kept`.
__device__ __forceinline__ uint32_t best_groups(const float* biased, int group_size, int num_groups, int kept) {
  const int lane = threadIdx.x % 32;
  float first = -INFINITY, second = -INFINITY;
  if (lane < num_groups) {
    for (int i = 0; i < group_size; ++i) {
      const float value = biased[lane * group_size + i];
      if (value > first) {
        second = first;
        first = value;
      } else if (value > second) {
        second = value;
      }
    }
  }
  const uint32_t key = ordered_bits(group_size > 1 ? first + second : first);
  int better = 0;
  for (int other = 0; other < num_groups; ++other) {
    const uint32_t theirs = __shfl_sync(~0u, key, other);
    better += theirs > key || (theirs == key && other < lane);
  }
  return __ballot_sync(~0u, lane < num_groups && better < kept);
}

// The expert with the largest key, the lowest of equals; it is taken out.
__device__ __forceinline__ int take_best(uint32_t (&keys)[kExpertsALane]) {
  const int lane = threadIdx.x % 32;
  uint32_t best = 0;
  int place = 0;
#pragma unroll
  for (int i = 0; i < kExpertsALane; ++i) {
    if (keys[i] > best) best = keys[i], place = i;
  }
  const uint32_t largest = __reduce_max_sync(~0u, best);
  const unsigned expert = __reduce_min_sync(~0u, best == largest ? unsigned(place * 32 + lane) : ~0u);
#pragma unroll
  for (int i = 0; i < kExpertsALane; ++i) {
    if (expert == unsigned(i * 32 + lane)) keys[i] = 0;
  }
  return static_cast<int>(expert);
}

struct RouteStorage {
  int counts[kMaxExperts];
  float scores[kRouteWarps][kMaxExperts];
  float biased[kRouteWarps][kMaxExperts];
};

template <typename Logit>
__device__ __forceinline__ void route_token(const RouteParams& params, RouteStorage& storage, int64_t token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_experts = params.num_experts;
  float* scores = storage.scores[warp];
  float* biased = storage.biased[warp];
  const auto* logits = static_cast<const Logit*>(params.logits) + token * num_experts;
  uint32_t keys[kExpertsALane];
#pragma unroll
  for (int i = 0; i < kExpertsALane; ++i) {
    const int expert = i * 32 + lane;
    keys[i] = 0;
    if (expert >= num_experts) continue;
    const float score = sigmoid(static_cast<float>(logits[expert]));
    params.scores[token * num_experts + expert] = score;
    scores[expert] = score;
    biased[expert] = score + params.bias[expert];
    keys[i] = ordered_bits(biased[expert]);
  }
  __syncwarp();
  if (params.groups_kept < params.num_groups) {
    const int group_size = num_experts / params.num_groups;
    const uint32_t kept = best_groups(biased, group_size, params.num_groups, params.groups_kept);
#pragma unroll
    for (int i = 0; i < kExpertsALane; ++i) {
      const int expert = i * 32 + lane;
      if (expert < num_experts && !(kept >> (expert / group_size) & 1)) keys[i] = 0;
    }
  }
  int mine = 0;  // lane k holds choice k
  float sum = 0;
  for (int k = 0; k < params.top_k; ++k) {
    const int expert = min(take_best(keys), num_experts - 1);
    if (lane == k) mine = expert;
    sum += scores[expert];
  }
  if (lane < params.top_k) {
    const float gate = params.renormalize ? scores[mine] / (sum + 1e-20f) : scores[mine];
    params.idx[token * params.top_k + lane] = mine;
    params.weight[token * params.top_k + lane] = gate * params.scale;
    atomicAdd(&storage.counts[mine], 1);
  }
  __syncwarp();
}

template <typename Logit>
__global__ void __launch_bounds__(kRouteWarps * 32) route_kernel(const __grid_constant__ RouteParams params) {
  __shared__ RouteStorage storage;
  for (int expert = threadIdx.x; expert < params.num_experts; expert += blockDim.x) storage.counts[expert] = 0;
  __syncthreads();
  const int64_t stride = int64_t(gridDim.x) * kRouteWarps;
  for (int64_t token = blockIdx.x * kRouteWarps + threadIdx.x / 32; token < params.num_tokens; token += stride) {
    route_token<Logit>(params, storage, token);
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < params.num_experts; expert += blockDim.x) {
    const int count = storage.counts[expert];
    if (count > 0) atomicAdd(reinterpret_cast<unsigned long long*>(params.counts + expert), count);
  }
}

// With s the scores, w_k = scale * s_k / S, S the sum of the chosen (or 1 without renormalisation).
template <typename Logit>
__global__ void __launch_bounds__(kRouteWarps * 32)
    route_backward_kernel(const __grid_constant__ RouteBackwardParams params) {
  __shared__ float chosen_grads[kRouteWarps][kMaxExperts];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_experts = params.num_experts;
  float* grads = chosen_grads[warp];
  const int64_t stride = int64_t(gridDim.x) * kRouteWarps;
  for (int64_t token = blockIdx.x * kRouteWarps + warp; token < params.num_tokens; token += stride) {
    const float* scores = params.scores + token * num_experts;
    for (int expert = lane; expert < num_experts; expert += 32) {
      grads[expert] = params.scores_grad == nullptr ? 0.0f : params.scores_grad[token * num_experts + expert];
    }
    __syncwarp();
    const bool holds = lane < params.top_k;
    const auto expert = holds ? static_cast<int>(params.idx[token * params.top_k + lane]) : 0;
    const float grad = holds ? params.weight_grad[token * params.top_k + lane] : 0.0f;
    const float score = holds ? scores[expert] : 0.0f;
    float sum = 1e-20f, dot = 0;
    for (int k = 0; k < params.top_k; ++k) {
      sum += __shfl_sync(~0u, score, k);
      dot += __shfl_sync(~0u, score, k) * __shfl_sync(~0u, grad, k);
    }
    if (holds) {
      grads[expert] += params.scale * (params.renormalize ? (grad - dot / sum) / sum : grad);
    }
    __syncwarp();
    auto* target = static_cast<Logit*>(params.logits_grad) + token * num_experts;
    for (int i = lane; i < num_experts; i += 32) {
      target[i] = static_cast<Logit>(grads[i] * scores[i] * (1.0f - scores[i]));
    }
    __syncwarp();
  }
}

}  // namespace dsv3rt
