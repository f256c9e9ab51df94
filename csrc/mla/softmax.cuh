// Online softmax on wgmma accumulators: a thread holds 32 columns of two rows, a quad of lanes a whole row.
#pragma once

#include <cuda_runtime.h>

#include "hopper/arithmetic.cuh"

namespace dsv3rt {

// Per row of a thread (0: its first, 1: eight below).
struct SoftmaxState {
  float peak[2] = {-INFINITY, -INFINITY};  // largest score so far, unscaled, over the row
  float sum[2] = {0, 0};                   // of exp2(scaled score - offset), over this thread's columns
  float rescale[2] = {1, 1};               // what sums over earlier blocks must be multiplied by
};

// What is subtracted from scaled scores: any finite number will do for a row that has seen nothing.
__device__ __forceinline__ float offset_of(float peak, float scale_log2) {
  return peak == -INFINITY ? 0 : __fmul_rn(peak, scale_log2);
}

__device__ __forceinline__ float max_over_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Hides the columns at or past `seen[row]`, counted from this thread's first column.
template <int kColumns>
__device__ __forceinline__ void mask_scores(float (&scores)[kColumns / 2], const int (&seen)[2]) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    const int column = i / 4 * 8 + i % 2;
    if (column >= seen[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

// Scores become weights exp2(scale_log2 * score - offset); state takes them in. A peak that is exceeded by kSlack at
// most, in the exponent, stays: weights are then up to 2^kSlack, and earlier sums keep their scale.
template <int kColumns, int kSlack = 0>
__device__ __forceinline__ void take_block(SoftmaxState& state, float (&scores)[kColumns / 2], float scale_log2) {
  float peak[2][2] = {{state.peak[0], -INFINITY}, {state.peak[1], -INFINITY}};  // two chains a row
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) peak[i / 2 % 2][i % 2] = fmaxf(peak[i / 2 % 2][i % 2], scores[i]);
  float offset[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float highest = max_over_quad(fmaxf(peak[row][0], peak[row][1]));
    if constexpr (kSlack > 0) {
      if ((highest - state.peak[row]) * scale_log2 <= kSlack) highest = state.peak[row];
    }
    offset[row] = offset_of(highest, scale_log2);
    state.rescale[row] = exp2_approx(__fmul_rn(state.peak[row], scale_log2) - offset[row]);
    state.peak[row] = highest;
  }
  float sum[2][2] = {};
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -offset[i / 2 % 2]));
    sum[i / 2 % 2][i % 2] += scores[i];
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    state.sum[row] = fmaf(state.sum[row], state.rescale[row], sum[row][0] + sum[row][1]);
  }
}

template <int kFragment>
__device__ __forceinline__ void scale_rows(float (&sums)[kFragment], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) sums[i] *= factor[i / 2 % 2];
}

}  // namespace dsv3rt
