// The router: a warp takes a token, and lane l its experts from l * kPerLane on. Choices are made on integer keys that
// order like the biased scores (NaN above everything). Lanes share the experts that may be chosen in the same way and
// sort theirs; then the best of all is a warp reduction, and the first lane that holds it has the lowest index.
#pragma once

#include "common/fp8_cast.cuh"
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

// The experts that a token may choose: those of the groups it keeps, or all, as one group.
struct ChoiceShape {
  bool grouped;
  int size;  // experts of a group
  uint32_t count;  // in all groups that are kept
  uint32_t reciprocal;  // as in GroupShape
};

__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
  return x != x ? kNanKey : key;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// 1 / (1 + e^-x), without branches. Large sums are made smaller first: their reciprocal may be denormal.
__device__ __forceinline__ float sigmoid(float x) {
  const float sum = 1.0f + expf(-x);
  const float factor = sum > 0x1p100f ? 0x1p-100f : 1.0f;
  const float near_one = sum * factor, estimate = reciprocal_approx(near_one);
  return factor * (near_one < INFINITY ? refine_reciprocal(near_one, estimate) : estimate);
}

// This lane's experts of a row, zero past its end. kWhole: four at a time, all there or none.
template <bool kWhole, int kPerLane, typename Element>
__device__ __forceinline__ void load_experts(const Element* row, int num_experts, float (&x)[kPerLane]) {
  const int first = lane_idx() * kPerLane;
  if constexpr (kWhole) {
    struct alignas(4 * sizeof(Element)) Four {
      Element elements[4];
    };
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      Four four{};
      if (first < num_experts) four = *reinterpret_cast<const Four*>(row + first + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = static_cast<float>(four.elements[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = first + i < num_experts ? static_cast<float>(row[first + i]) : 0.0f;
  }
}

template <bool kWhole, int kPerLane>
__device__ __forceinline__ void store_experts(float* row, int num_experts, const float (&x)[kPerLane]) {
  const int first = lane_idx() * kPerLane;
  if constexpr (kWhole) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      if (first < num_experts) {
        *reinterpret_cast<float4*>(row + first + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < num_experts) row[first + i] = x[i];
    }
  }
}

// What a warp keeps of its token, by expert; past the last expert keys are zero.
template <int kPerLane>
struct TokenStorage {
  alignas(16) uint32_t keys[32 * kPerLane];
  alignas(16) float scores[32 * kPerLane];
  int groups[kMaxExpertGroups];  // that are kept, in their order
  int chosen[kMaxTopK];
};

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

// Lists the groups that a token may use, in their order.
template <int kPerLane>
__device__ __forceinline__ void list_groups(const RouteParams& params, const GroupShape& shape,
                                            TokenStorage<kPerLane>& storage) {
  const unsigned kept = kept_groups(group_key(storage.keys, shape, params.num_groups), shape, params);
  const bool first_of_kept = lane_idx() % shape.lanes == 0 && (kept >> lane_idx() & 1);
  const unsigned firsts = __ballot_sync(~0u, first_of_kept);
  if (first_of_kept) storage.groups[__popc(firsts & ((1u << lane_idx()) - 1))] = lane_idx() / shape.lanes;
}

// An expert that may be chosen.
struct Candidate {
  uint32_t key;
  int expert;
};

// By falling key, those of the same key in their order: only neighbours trade places.
template <int kCount>
__device__ __forceinline__ void sort(Candidate (&candidates)[kCount]) {
#pragma unroll
  for (int round = 0; round < kCount; ++round) {
#pragma unroll
    for (int i = round % 2; i + 1 < kCount; i += 2) {
      Candidate &a = candidates[i], &b = candidates[i + 1];
      const bool swapped = b.key > a.key;
      const Candidate first = swapped ? b : a, second = swapped ? a : b;
      a = first, b = second;
    }
  }
}

// Where the best that is left is minus infinity, experts of dropped groups, which count as that, are no worse: then
// come those of the lowest index that are not chosen yet, the k-th and on.
template <int kPerLane>
__device__ __forceinline__ void choose_lowest(int top_k, int k, TokenStorage<kPerLane>& storage) {
  for (; k < top_k; ++k) {
    __syncwarp();
    bool taken = false;
    for (int i = 0; i < k; ++i) taken |= storage.chosen[i] == lane_idx();
    const int lowest = __ffs(__ballot_sync(~0u, !taken)) - 1;
    if (lane_idx() == lowest) storage.chosen[k] = lowest;
  }
}

// Leaves the experts of a token in storage.chosen, by falling key. A lane looks at kCandidates of them.
template <int kCandidates, int kPerLane>
__device__ __forceinline__ void choose(const RouteParams& params, const ChoiceShape& shape,
                                       TokenStorage<kPerLane>& storage) {
  Candidate candidates[kCandidates];
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const uint32_t index = lane_idx() * kCandidates + i, group = index * shape.reciprocal >> kGroupShift;
    candidates[i] = {0, kMaxExperts};
    if (index < shape.count) {
      const int of_group = shape.grouped ? storage.groups[group] : 0;
      candidates[i].expert = of_group * shape.size + (index - group * shape.size);
      candidates[i].key = storage.keys[candidates[i].expert];
    }
  }
  sort(candidates);
  for (int k = 0; k < params.top_k; ++k) {
    const uint32_t top = __reduce_max_sync(~0u, candidates[0].key);
    if (top <= kMinusInfinityKey) return choose_lowest(params.top_k, k, storage);
    const unsigned holders = __ballot_sync(~0u, candidates[0].key == top);
    if (lane_idx() == __ffs(holders) - 1) {
      storage.chosen[k] = candidates[0].expert;
#pragma unroll
      for (int i = 1; i < kCandidates; ++i) candidates[i - 1] = candidates[i];
      candidates[kCandidates - 1].key = 0;
    }
  }
}

template <typename Element, int kPerLane, int kCandidates, bool kWhole>
__global__ void __launch_bounds__(32 * kTokenWarps, kPerLane > 8 ? 2 : 4)
    route_kernel(const __grid_constant__ RouteParams params, const __grid_constant__ GroupShape groups,
                 const __grid_constant__ ChoiceShape choices) {
  __shared__ TokenStorage<kPerLane> storages[kTokenWarps];
  __shared__ int loads[32 * kPerLane];
  for (int e = threadIdx.x; e < 32 * kPerLane; e += 32 * kTokenWarps) loads[e] = 0;
  __syncthreads();
  auto& storage = storages[warp_idx()];
  float bias[kPerLane];
  load_experts<kWhole>(params.bias, params.num_experts, bias);
  const int64_t step = int64_t(gridDim.x) * kTokenWarps;
  for (int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx(); t < params.num_tokens; t += step) {
    float score[kPerLane];
    load_experts<kWhole>(static_cast<const Element*>(params.logits) + t * params.num_experts, params.num_experts,
                         score);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane_idx() * kPerLane + i;
      score[i] = sigmoid(score[i]);
      storage.scores[e] = score[i];
      storage.keys[e] = e < params.num_experts ? key_of(__fadd_rn(score[i], bias[i])) : 0;
    }
    store_experts<kWhole>(params.scores + t * params.num_experts, params.num_experts, score);
    __syncwarp();
    if (choices.grouped) list_groups(params, groups, storage);
    __syncwarp();
    choose<kCandidates>(params, choices, storage);
    __syncwarp();
    const int expert = lane_idx() < params.top_k ? storage.chosen[lane_idx()] : 0;
    const float picked = storage.scores[expert];
    float sum = 0.0f;  // in the order of the choices
    for (int k = 0; k < params.top_k; ++k) sum += __shfl_sync(~0u, picked, k);
    if (lane_idx() < params.top_k) {
      const float weight = params.renormalize ? __fdiv_rn(picked, sum + kSumFloor) : picked;
      params.idx[t * params.top_k + lane_idx()] = expert;
      params.weight[t * params.top_k + lane_idx()] = weight * params.scale;
      atomicAdd(&loads[expert], 1);
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
