// The sequence-wise balance loss. A block adds up a part of a sequence, then a block a sequence the parts, then a warp
// the sequences: every sum has its order. A token's gradient needs its sequence's slopes and two sums over its scores.
#pragma once

#include "moe/params.h"
#include "moe/warp.cuh"

namespace dsv3rt {

constexpr int kSequenceThreads = kMaxExperts;

struct Span {
  int begin, end;

  __device__ __forceinline__ Span(const int* cu_seqlens, int sequence, int64_t num_tokens) {
    const int limit = static_cast<int>(num_tokens);
    begin = min(max(cu_seqlens[sequence], 0), limit);
    end = max(begin, min(cu_seqlens[sequence + 1], limit));
  }
};

template <int kPerLane>
__global__ void __launch_bounds__(32 * kTokenWarps) balance_parts_kernel(const __grid_constant__ BalanceParams params) {
  __shared__ float shares[kTokenWarps][32 * kPerLane];
  __shared__ int loads[32 * kPerLane];
  for (int e = threadIdx.x; e < 32 * kPerLane; e += 32 * kTokenWarps) loads[e] = 0;
  __syncthreads();
  const int sequence = blockIdx.x / params.num_parts, part = blockIdx.x % params.num_parts;
  const Span span(params.cu_seqlens, sequence, params.num_tokens);
  const int length = (span.end - span.begin + params.num_parts - 1) / params.num_parts;
  const int begin = span.begin + min(part * length, span.end - span.begin), end = min(begin + length, span.end);
  float share[kPerLane] = {};
  for (int t = begin + warp_idx(); t < end; t += kTokenWarps) {
    float score[kPerLane];
    load_row(params.scores + int64_t(t) * params.num_experts, params.num_experts, score);
    const float inverse = __fdiv_rn(1.0f, row_sum(score) + kSumFloor);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) share[i] += score[i] * inverse;
    const int expert = choice_of(params.idx, t, params.top_k, params.num_experts);
    const unsigned same = __match_any_sync(~0u, expert);
    if (expert >= 0 && __ffs(same) - 1 == lane_idx()) atomicAdd(&loads[expert], 1);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) shares[warp_idx()][lane_idx() + 32 * i] = share[i];
  __syncthreads();
  for (int e = threadIdx.x; e < params.num_experts; e += 32 * kTokenWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kTokenWarps; ++w) sum += shares[w][e];
    params.share_parts[int64_t(blockIdx.x) * params.num_experts + e] = sum;
    params.load_parts[int64_t(blockIdx.x) * params.num_experts + e] = loads[e];
  }
}

__global__ void __launch_bounds__(kSequenceThreads)
    balance_sequences_kernel(const __grid_constant__ BalanceParams params) {
  __shared__ float sums[kSequenceThreads / 32];
  __shared__ int sequences_with_tokens;
  if (threadIdx.x == 0) sequences_with_tokens = 0;
  __syncthreads();
  int mine = 0;
  for (int b = threadIdx.x; b < params.num_sequences; b += kSequenceThreads) {
    const Span span(params.cu_seqlens, b, params.num_tokens);
    mine += span.end > span.begin;
  }
  if (mine > 0) atomicAdd(&sequences_with_tokens, mine);
  __syncthreads();
  const int sequence = blockIdx.x, e = threadIdx.x;
  const Span span(params.cu_seqlens, sequence, params.num_tokens);
  const float length = max(span.end - span.begin, 1);
  const float factor = params.alpha / static_cast<float>(max(sequences_with_tokens, 1)) / length;
  float term = 0.0f;
  if (e < params.num_experts) {
    const int64_t first = int64_t(sequence) * params.num_parts * params.num_experts + e;
    float share = 0.0f;
    int load = 0;
#pragma unroll 8
    for (int part = 0; part < params.num_parts; ++part) {
      share += params.share_parts[first + int64_t(part) * params.num_experts];
      load += params.load_parts[first + int64_t(part) * params.num_experts];
    }
    const float per_choice = static_cast<float>(params.num_experts) / static_cast<float>(params.top_k);
    const float slope = static_cast<float>(load) * per_choice / length * factor;
    params.slope[int64_t(sequence) * params.num_experts + e] = slope;
    term = slope * share;
  }
  const float sum = warp_sum(term);
  if (lane_idx() == 0) sums[warp_idx()] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float loss = 0.0f;
    for (int w = 0; w < kSequenceThreads / 32; ++w) loss += sums[w];
    params.sequence_loss[sequence] = loss;
  }
}

__global__ void __launch_bounds__(32) balance_total_kernel(const __grid_constant__ BalanceParams params) {
  float sum = 0.0f;
  for (int b = lane_idx(); b < params.num_sequences; b += 32) sum += params.sequence_loss[b];
  sum = warp_sum(sum);
  if (lane_idx() == 0) *params.loss = sum;
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
