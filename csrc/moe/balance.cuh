// The sequence-wise balance loss. A block adds up a part of a sequence, the last block of a sequence its parts, the
// last sequence all of them: every sum has its order, whoever makes it. A token's gradient needs its sequence's slopes
// and two sums over its scores.
#pragma once

#include "hopper/barrier.cuh"
#include "moe/params.h"
#include "moe/warp.cuh"

namespace dsv3rt {

constexpr int kBalanceThreads = 1024;
constexpr int kBalanceWarps = kBalanceThreads / 32;

struct Span {
  int begin, end;

  __device__ __forceinline__ Span(const int* cu_seqlens, int sequence, int64_t num_tokens) {
    const int limit = static_cast<int>(num_tokens);
    begin = min(max(cu_seqlens[sequence], 0), limit);
    end = max(begin, min(cu_seqlens[sequence + 1], limit));
  }
};

// What a block adds up: a row a warp; then, of a sequence, a row a group of threads.
template <int kPerLane>
struct BalanceSums {
  static constexpr int kExperts = 32 * kPerLane;
  static constexpr int kGroups = kBalanceThreads / kExperts;
  static constexpr int kTokensInFlight = kPerLane >= 16 ? 1 : kPerLane == 8 ? 2 : 4;  // of a warp

  float shares[kBalanceWarps][kExperts];
  int loads[kGroups][kExperts];  // the first of a part
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

template <int kPerLane>
__device__ __forceinline__ void add_part(const BalanceParams& params, const Span& span, int part,
                                         BalanceSums<kPerLane>& sums) {
  constexpr int kTokensInFlight = BalanceSums<kPerLane>::kTokensInFlight;
  const int length = (span.end - span.begin + params.num_parts - 1) / params.num_parts;
  const int begin = span.begin + min(part * length, span.end - span.begin), end = min(begin + length, span.end);
  float share[kPerLane] = {};
  for (int first = begin + warp_idx(); first < end; first += kBalanceWarps * kTokensInFlight) {
    float score[kTokensInFlight][kPerLane];
    int expert[kTokensInFlight];
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
      const int t = first + i * kBalanceWarps;
      load_row(params.scores + int64_t(t) * params.num_experts, t < end ? params.num_experts : 0, score[i]);
      expert[i] = t < end ? choice_of(params.idx, t, params.top_k, params.num_experts) : -1;
    }
#pragma unroll
    for (int i = 0; i < kTokensInFlight; ++i) {
      if (first + i * kBalanceWarps < end) add_token(score[i], expert[i], share, sums.loads[0]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sums.shares[warp_idx()][lane_idx() + 32 * i] = share[i];
  __syncthreads();
  for (int e = threadIdx.x; e < params.num_experts; e += kBalanceThreads) {
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
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(ticket, 1) == count - 1);
  __threadfence();
  return last;
}

// The shares and loads of all parts of a sequence, by groups of threads that take neighbouring parts.
template <int kPerLane>
__device__ __forceinline__ void add_parts(const BalanceParams& params, int sequence, BalanceSums<kPerLane>& sums) {
  using Sums = BalanceSums<kPerLane>;
  const int e = threadIdx.x % Sums::kExperts, group = threadIdx.x / Sums::kExperts;
  const int length = (params.num_parts + Sums::kGroups - 1) / Sums::kGroups;
  const int end = min((group + 1) * length, params.num_parts);
  float share = 0.0f;
  int load = 0;
  if (e < params.num_experts) {
    const int64_t first = int64_t(sequence) * params.num_parts * params.num_experts + e;
#pragma unroll 16
    for (int part = group * length; part < end; ++part) {
      share += __ldcg(params.share_parts + first + int64_t(part) * params.num_experts);
      load += __ldcg(params.load_parts + first + int64_t(part) * params.num_experts);
    }
  }
  sums.shares[group][e] = share;
  sums.loads[group][e] = load;
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

// Slopes and loss of a sequence, from its parts.
template <int kPerLane>
__device__ __forceinline__ void finish_sequence(const BalanceParams& params, int sequence,
                                                BalanceSums<kPerLane>& sums) {
  __shared__ float warp_sums[kBalanceWarps];
  add_parts(params, sequence, sums);
  const int sequences_with_tokens = count_sequences(params);  // and a barrier
  const Span span(params.cu_seqlens, sequence, params.num_tokens);
  const float length = max(span.end - span.begin, 1);
  const float factor = params.alpha / static_cast<float>(max(sequences_with_tokens, 1)) / length;
  const float per_choice = static_cast<float>(params.num_experts) / static_cast<float>(params.top_k);
  const int e = threadIdx.x;
  float term = 0.0f;
  if (e < params.num_experts) {
    float share = 0.0f;
    int load = 0;
#pragma unroll
    for (int group = 0; group < BalanceSums<kPerLane>::kGroups; ++group) {
      share += sums.shares[group][e];
      load += sums.loads[group][e];
    }
    const float slope = static_cast<float>(load) * per_choice / length * factor;
    params.slope[int64_t(sequence) * params.num_experts + e] = slope;
    term = slope * share;
  }
  const float sum = warp_sum(term);
  if (lane_idx() == 0) warp_sums[warp_idx()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float loss = 0.0f;
    for (int w = 0; w < kBalanceWarps; ++w) loss += warp_sums[w];
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

template <int kPerLane>
__global__ void __launch_bounds__(kBalanceThreads) balance_kernel(const __grid_constant__ BalanceParams params) {
  extern __shared__ float4 balance_storage[];
  auto& sums = *reinterpret_cast<BalanceSums<kPerLane>*>(balance_storage);
  const int sequence = blockIdx.x / params.num_parts, part = blockIdx.x % params.num_parts;
  if (params.num_sequences > 0) {
    if (threadIdx.x < BalanceSums<kPerLane>::kExperts) sums.loads[0][threadIdx.x] = 0;
    __syncthreads();
    add_part(params, Span(params.cu_seqlens, sequence, params.num_tokens), part, sums);
    wait_for_prior_grid();
    if (!is_last(params.tickets + sequence, params.num_parts)) return;
    finish_sequence(params, sequence, sums);
    if (!is_last(params.tickets + params.num_sequences, params.num_sequences)) return;
  }
  add_sequences(params);
}

// The sequence of a token: how many end at or before it.
__device__ __forceinline__ int sequence_of(const int* cu_seqlens, int num_sequences, int64_t token) {
  int sequence = 0;
  for (int first = 0; first < num_sequences; first += 32) {
    const int b = first + lane_idx();
    sequence += __popc(__ballot_sync(~0u, b < num_sequences && cu_seqlens[b + 1] <= token));
  }
  return sequence;
}

template <int kPerLane>
__global__ void __launch_bounds__(32 * kTokenWarps)
    balance_backward_kernel(const __grid_constant__ BalanceBackwardParams params) {
  const int64_t t = int64_t(blockIdx.x) * kTokenWarps + warp_idx();
  if (t >= params.num_tokens) return;
  const int64_t row = t * params.num_experts;
  float score[kPerLane], grad[kPerLane];
  load_row(params.scores + row, params.num_experts, score);
  const int sequence = sequence_of(params.cu_seqlens, params.num_sequences, t);
  const bool inside = sequence < params.num_sequences && params.cu_seqlens[sequence] <= t;
  load_row(params.slope + int64_t(inside ? sequence : 0) * params.num_experts, inside ? params.num_experts : 0, grad);
  const float inverse = __fdiv_rn(1.0f, row_sum(score) + kSumFloor), upstream = *params.grad;
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) dot += grad[i] * score[i];
  dot = warp_sum(dot) * inverse;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) grad[i] = inside ? upstream * (grad[i] - dot) * inverse : 0.0f;
  store_row(params.scores_grad + row, params.num_experts, grad);
}

}  // namespace dsv3rt
