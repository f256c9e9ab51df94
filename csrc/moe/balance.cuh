// The sequence-wise balance loss. A block adds up a part of a sequence, the last block of a sequence its parts, the
// last sequence all of them: every sum has its order, whoever makes it.
#pragma once

#include <cuda/atomic>

#include "hopper/barrier.cuh"
#include "moe/params.h"
#include "moe/warp.cuh"

namespace dsv3rt {

constexpr int kBalanceThreads = 512;
constexpr int kBalanceWarps = kBalanceThreads / 32;
static_assert(kBalanceThreads >= kMaxExperts);

struct Span {
  int begin, end;

  __device__ __forceinline__ Span(const int* cu_seqlens, int sequence, int64_t num_tokens) {
    const int limit = static_cast<int>(num_tokens);
    begin = min(max(cu_seqlens[sequence], 0), limit);
    end = max(begin, min(cu_seqlens[sequence + 1], limit));
  }
};

template <int kPerLane>
struct BalanceSums {
  static constexpr int kExperts = 32 * kPerLane;

  alignas(16) float shares[kBalanceWarps][kExperts];
  int loads[kBalanceWarps][kExperts];  // the first of a part
  float warp_sums[kBalanceWarps];
};

template <int kPerLane>
__device__ __forceinline__ void add_token(const float (&score)[kPerLane], int expert, float (&share)[kPerLane],
                                          int (&loads)[32 * kPerLane]) {
  const float inverse = __fdiv_rn(1.0f, row_sum(score) + kSumFloor);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) share[i] += score[i] * inverse;
  const unsigned same = __match_any_sync(~0u, expert);
  if (expert >= 0 && __ffs(same) - 1 == lane_idx()) atomicAdd(&loads[expert], 1);
}

template <int kWidth, int kPerLane>
__device__ __forceinline__ void add_part(const BalanceParams& params, const Span& span, int part,
                                         BalanceSums<kPerLane>& sums) {
  constexpr int kTokensInFlight = kPerLane > 8 ? 1 : kPerLane == 8 && kWidth == 1 ? 2 : 4;  // of a warp
  const int length = (span.end - span.begin + params.num_parts - 1) / params.num_parts;
  const int begin = span.begin + min(part * length, span.end - span.begin), end = min(begin + length, span.end);
  float share[kPerLane] = {};
  for (int first = begin + warp_idx(); first < end; first += kBalanceWarps * kTokensInFlight) {
    float score[kTokensInFlight][kPerLane];
    int expert[kTokensInFlight];
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
      const int t = first + i * kBalanceWarps;
      load_row<kWidth>(params.scores + int64_t(t) * params.num_experts, t < end ? params.num_experts : 0, score[i]);
      expert[i] = t < end ? choice_of(params.idx, t, params.top_k, params.num_experts) : -1;
    }
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
      if (first + i * kBalanceWarps < end) add_token(score[i], expert[i], share, sums.loads[0]);
    }
  }
  store_row<kWidth>(sums.shares[warp_idx()], 32 * kPerLane, share);
  __syncthreads();
  const int e = threadIdx.x;
  if (e < params.num_experts) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kBalanceWarps; ++w) sum += sums.shares[w][e];
    params.share_parts[int64_t(blockIdx.x) * params.num_experts + e] = sum;
    params.load_parts[int64_t(blockIdx.x) * params.num_experts + e] = sums.loads[0][e];
  }
}

// Whether this block is the last of `count` to ask; if it is, it sees what all of them wrote before. Every thread of
// the block calls it.
__device__ __forceinline__ bool is_last(int32_t* ticket, int count) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    const cuda::atomic_ref<int32_t, cuda::thread_scope_device> asked(*ticket);
    last = asked.fetch_add(1, cuda::memory_order_acq_rel) == count - 1;
  }
  return __syncthreads_or(last);
}

// How many sequences have tokens. Every thread of the block calls it.
__device__ __forceinline__ int count_sequences(const BalanceParams& params) {
  int count = 0;
  for (int first = 0; first < params.num_sequences; first += kBalanceThreads) {
    const int b = first + threadIdx.x;
    bool has_tokens = false;
    if (b < params.num_sequences) {
      const Span span(params.cu_seqlens, b, params.num_tokens);
      has_tokens = span.end > span.begin;
    }
    count += __syncthreads_count(has_tokens);
  }
  return count;
}

// The share and the load of expert threadIdx.x in a sequence, from all parts of it, by groups of threads that take
// neighbouring parts. Every thread of the block calls it; those past the experts get zeros.
template <int kPerLane>
__device__ __forceinline__ void add_parts(const BalanceParams& params, int sequence, BalanceSums<kPerLane>& sums,
                                          float& share, int& load) {
  constexpr int kExperts = BalanceSums<kPerLane>::kExperts;
  constexpr int kGroups = kBalanceThreads / kExperts;
  const int e = threadIdx.x % kExperts, group = threadIdx.x / kExperts;
  const int length = (params.num_parts + kGroups - 1) / kGroups;
  const int end = min((group + 1) * length, params.num_parts);
  share = 0.0f;
  load = 0;
  if (e < params.num_experts) {
    const int64_t first = int64_t(sequence) * params.num_parts * params.num_experts + e;
#pragma unroll 16
    for (int part = group * length; part < end; ++part) {
      share += __ldcg(params.share_parts + first + int64_t(part) * params.num_experts);
      load += __ldcg(params.load_parts + first + int64_t(part) * params.num_experts);
    }
  }
  if constexpr (kGroups > 1) {
    sums.shares[group][e] = share;
    sums.loads[group][e] = load;
    __syncthreads();
    if (group > 0) share = 0.0f, load = 0;
    for (int other = 1; group == 0 && other < kGroups; ++other) {
      share += sums.shares[other][e];
      load += sums.loads[other][e];
    }
  }
}

// Slopes and loss of a sequence. Every thread of the block calls it.
template <int kPerLane>
__device__ __forceinline__ void finish_sequence(const BalanceParams& params, int sequence, const Span& span,
                                                int sequences_with_tokens, BalanceSums<kPerLane>& sums) {
  float share;
  int load;
  add_parts(params, sequence, sums, share, load);
  const float length = max(span.end - span.begin, 1);
  const float factor = params.alpha / static_cast<float>(max(sequences_with_tokens, 1)) / length;
  const float per_choice = static_cast<float>(params.num_experts) / static_cast<float>(params.top_k);
  const float slope = static_cast<float>(load) * per_choice / length * factor;
  const int e = threadIdx.x;
  if (e < params.num_experts) params.slope[int64_t(sequence) * params.num_experts + e] = slope;
  const float sum = warp_sum(slope * share);
  if (lane_idx() == 0) sums.warp_sums[warp_idx()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float loss = 0.0f;
    for (int w = 0; w < kBalanceWarps; ++w) loss += sums.warp_sums[w];
    params.sequence_loss[sequence] = loss;
  }
}

__device__ __forceinline__ void add_sequences(const BalanceParams& params) {
  if (threadIdx.x >= 32) return;
  float sum = 0.0f;
  for (int b = lane_idx(); b < params.num_sequences; b += 32) sum += __ldcg(params.sequence_loss + b);
  sum = warp_sum(sum);
  if (lane_idx() == 0) *params.loss = sum;
}

template <int kPerLane, int kWidth>
__global__ void __launch_bounds__(kBalanceThreads, 2) balance_kernel(const __grid_constant__ BalanceParams params) {
  extern __shared__ float4 balance_storage[];
  auto& sums = *reinterpret_cast<BalanceSums<kPerLane>*>(balance_storage);
  const int sequence = blockIdx.x / params.num_parts, part = blockIdx.x % params.num_parts;
  const Span span(params.cu_seqlens, sequence, params.num_tokens);
  if (threadIdx.x < BalanceSums<kPerLane>::kExperts) sums.loads[0][threadIdx.x] = 0;
  __syncthreads();
  add_part<kWidth>(params, span, part, sums);
  const int sequences_with_tokens = count_sequences(params);
  wait_for_prior_grid();
  if (!is_last(params.tickets + sequence, params.num_parts)) return;
  finish_sequence(params, sequence, span, sequences_with_tokens, sums);
  if (params.num_sequences > 1 && !is_last(params.tickets + params.num_sequences, params.num_sequences)) return;
  add_sequences(params);
}

}  // namespace dsv3rt
