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
  int size;        // experts of a group
  int lane_shift;  // 2^lane_shift lanes score a group; so many for each fit a warp
};

// The experts that a token may choose: those of the groups it keeps, or all, as one group.
struct ChoiceShape {
  bool grouped;
  int size;             // experts of a group
  uint32_t count;       // in all groups that are kept
  uint32_t reciprocal;  // i / size == i * reciprocal >> kGroupShift for i < 512: off by less than 512 / 2^20 < 1 / 512
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

// A lane's neighbouring experts. kWhole: four at a time, all there or none.
template <bool kWhole, int kPerLane, typename Element>
__device__ __forceinline__ void load_experts(const Element* row, int num_experts, float (&x)[kPerLane]) {
  load_lane<kWhole ? 4 : 1>(row, num_experts, x, [](int i) { return lane_idx() * kPerLane + i; });
}

template <bool kWhole, int kPerLane>
__device__ __forceinline__ void store_experts(float* row, int num_experts, const float (&x)[kPerLane]) {
  store_lane<kWhole ? 4 : 1>(row, num_experts, x, [](int i) { return lane_idx() * kPerLane + i; });
}

// What a warp keeps of its token, by expert; past the last expert keys are zero.
template <int kPerLane>
struct TokenStorage {
  alignas(16) uint32_t keys[32 * kPerLane];
  alignas(16) float scores[32 * kPerLane];
  int groups[kMaxExpertGroups];  // that are kept, in their order
  int chosen[kMaxTopK];

  __device__ __forceinline__ void put(int first, const uint32_t (&key)[kPerLane], const float (&score)[kPerLane]) {
    if constexpr (kPerLane >= 4) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        *reinterpret_cast<uint4*>(keys + first + i) = make_uint4(key[i], key[i + 1], key[i + 2], key[i + 3]);
        *reinterpret_cast<float4*>(scores + first + i) =
            make_float4(score[i], score[i + 1], score[i + 2], score[i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys[first + i] = key[i], scores[first + i] = score[i];
    }
  }
};

// The two largest of some keys.
struct BestTwo {
  uint32_t best = 0, second = 0;

  __device__ __forceinline__ void add(uint32_t key) {
    second = max(second, min(best, key));
    best = max(best, key);
  }
};

// Of this lane's share of the group that it scores. `keys` holds the token's. Groups start at different steps: their
// sizes are often a multiple of the 32 banks.
__device__ __forceinline__ BestTwo best_two(const uint32_t* keys, const GroupShape& shape, int num_groups) {
  const int lanes = 1 << shape.lane_shift, group = lane_idx() >> shape.lane_shift;
  const int first_member = lane_idx() & (lanes - 1), num_steps = (shape.size + lanes - 1) >> shape.lane_shift;
  BestTwo two;
  if (group < num_groups) {
    int step = min(group, num_steps - 1);
#pragma unroll 1
    for (int i = 0; i < num_steps; ++i) {
      const int member = first_member + (step << shape.lane_shift);
      two.add(member < shape.size ? keys[group * shape.size + member] : 0);
      step = step + 1 == num_steps ? 0 : step + 1;
    }
  }
  __syncwarp();
  return two;
}

// The key of the sum of the two best biased scores of this lane's group, from the best two of each of its lanes.
__device__ __forceinline__ uint32_t group_key(BestTwo two, const GroupShape& shape) {
  for (int distance = 1; distance < 1 << shape.lane_shift; distance *= 2) {
    const uint32_t best = __shfl_xor_sync(~0u, two.best, distance), second = __shfl_xor_sync(~0u, two.second, distance);
    two.second = max(min(two.best, best), max(two.second, second));
    two.best = max(two.best, best);
  }
  return key_of(value_of(two.best) + (shape.size > 1 ? value_of(two.second) : 0.0f));
}

// Lists the groups that a token may use, in their order; `key` is that of this lane's group.
template <int kPerLane>
__device__ __forceinline__ void list_groups(const RouteParams& params, const GroupShape& shape, uint32_t key,
                                            TokenStorage<kPerLane>& storage) {
  const int group = lane_idx() >> shape.lane_shift;
  if (group >= params.num_groups) key = 0;
  unsigned kept = 0;  // by bits
#pragma unroll 1
  for (int i = 0; i < params.groups_kept; ++i) {
    const uint32_t top = __reduce_max_sync(~0u, key);
    const int best = (__ffs(__ballot_sync(~0u, key == top)) - 1) >> shape.lane_shift;  // of equal ones the first
    kept |= 1u << best;
    if (group == best) key = 0;  // under that of any sum
  }
  if (kept >> lane_idx() & 1) storage.groups[__popc(kept & ((1u << lane_idx()) - 1))] = lane_idx();
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
__device__ __noinline__ void choose_lowest(int top_k, int k, TokenStorage<kPerLane>& storage) {
  for (; k < top_k; ++k) {
    __syncwarp();
    bool taken = false;
    for (int i = 0; i < k; ++i) taken |= storage.chosen[i] == lane_idx();
    const int lowest = __ffs(__ballot_sync(~0u, !taken)) - 1;
    if (lane_idx() == lowest) storage.chosen[k] = lowest;
  }
}

// Leaves the experts of a token in storage.chosen, by falling key. A lane looks at kCandidates of them.
template <int kCandidates, bool kAligned, int kPerLane>
__device__ __forceinline__ void choose(const RouteParams& params, const ChoiceShape& shape,
                                       TokenStorage<kPerLane>& storage) {
  Candidate candidates[kCandidates];
  if constexpr (kAligned) {  // a lane's are neighbours
    const uint32_t index = lane_idx() * kCandidates, group = index * shape.reciprocal >> kGroupShift;
    const bool exist = index < shape.count;
    const int first =
        exist ? (shape.grouped ? storage.groups[group] : 0) * shape.size + (index - group * shape.size) : 0;
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) candidates[i] = {exist ? storage.keys[first + i] : 0, first + i};
  } else {
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
  }
  sort(candidates);
#pragma unroll 1
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

// kAligned: a lane's experts exist all or not at all, and lie in one group, of 2^lane_shift lanes where groups matter.
template <typename Element, int kPerLane, int kCandidates, bool kAligned>
__global__ void __launch_bounds__(32 * kTokenWarps, kPerLane > 8 ? 2 : 4)
    route_kernel(const __grid_constant__ RouteParams params, const __grid_constant__ GroupShape groups,
                 const __grid_constant__ ChoiceShape choices) {
  __shared__ TokenStorage<kPerLane> storages[kTokenWarps];
  __shared__ int loads[32 * kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i += kTokenWarps) {
    if (i * 32 + threadIdx.x < 32 * kPerLane) loads[i * 32 + threadIdx.x] = 0;
  }
  __syncthreads();
  auto& storage = storages[warp_idx()];
  float bias[kPerLane];
  load_experts<kAligned>(params.bias, params.num_experts, bias);
  const int64_t step = int64_t(gridDim.x) * kTokenWarps;
  for (int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx(); t < params.num_tokens; t += step) {
    float score[kPerLane];
    uint32_t key[kPerLane];
    load_experts<kAligned>(static_cast<const Element*>(params.logits) + t * params.num_experts, params.num_experts,
                           score);
    const int first = lane_idx() * kPerLane;
    BestTwo two;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      score[i] = sigmoid(score[i]);
      key[i] = first + (kAligned ? 0 : i) < params.num_experts ? key_of(__fadd_rn(score[i], bias[i])) : 0;
      two.add(key[i]);
    }
    store_experts<kAligned>(params.scores + t * params.num_experts, params.num_experts, score);
    storage.put(first, key, score);
    __syncwarp();
    if (choices.grouped) {
      if (!kAligned) two = best_two(storage.keys, groups, params.num_groups);
      list_groups(params, groups, group_key(two, groups), storage);
      __syncwarp();
    }
    choose<kCandidates, kAligned>(params, choices, storage);
    __syncwarp();
    const int expert = lane_idx() < params.top_k ? storage.chosen[lane_idx()] : 0;
    const float picked = lane_idx() < params.top_k ? storage.scores[expert] : 0.0f;
    float sum = 0.0f;  // in the order of the choices; past them come zeros
#pragma unroll
    for (int k = 0; k < kMaxTopK; ++k) sum += __shfl_sync(~0u, picked, k);
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
#pragma unroll 1
  for (int e = threadIdx.x; e < params.num_experts; e += 32 * kTokenWarps) {
    if (loads[e] > 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(params.counts + e), static_cast<unsigned long long>(loads[e]));
    }
  }
}

}  // namespace dsv3rt
