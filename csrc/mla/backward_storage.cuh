// Shared memory of the backward kernel, laid out as in the forward pass.
#pragma once

#include <cuda_bf16.h>

#include "hopper/barrier.cuh"
#include "mla/backward_tiles.cuh"

namespace dsv3rt {

constexpr int kBackwardSlab = 64;
constexpr int kBackwardThreads = 256;  // two warpgroups of 64 keys each; no producer: registers are short
constexpr int kQueryStages = 3, kDoutStages = 2, kDscoreBuffers = 2;

using BackwardKeySlab = __nv_bfloat16[kBackwardKeys * kBackwardSlab];
using BackwardQuerySlab = __nv_bfloat16[kBackwardQueries * kBackwardSlab];

// A warpgroup's columns of dq, all 64 queries: 64 of nope, 32 of rope.
struct QueryGradient {
  float nope[kNopeDim / 4];
  float rope[kRopeDim / 4];
};

// Sums of dq over blocks of keys are kept as the threads hold them: four accumulators of each thread of a warpgroup in
// a row, then the next four.
constexpr int kQuerySumFloats = kBackwardQueries * kQueryDim, kQuerySumStride = 128 * 4;

__device__ __forceinline__ int query_sum_offset() {
  return threadIdx.x / 128 * (kQuerySumFloats / 2) + threadIdx.x % 128 * 4;
}

// Of a tile of queries, as the preprocessing kernel writes it.
struct QueryStatistics {
  float lse_log2[kBackwardQueries];
  float delta[kBackwardQueries];
};

struct BackwardStorage {
  alignas(1024) BackwardKeySlab k[kQueryDim / kBackwardSlab];
  alignas(1024) BackwardKeySlab v[kValueDim / kBackwardSlab];
  alignas(1024) BackwardQuerySlab q[kQueryStages][kQueryDim / kBackwardSlab];
  alignas(1024) BackwardQuerySlab dout[kDoutStages][kValueDim / kBackwardSlab];
  alignas(1024) __nv_bfloat16 dscores[kDscoreBuffers][kBackwardKeys * kBackwardQueries];  // a row of 64 queries a key
  alignas(128) QueryStatistics statistics[kQueryStages];
  Barrier keys_full, q_full[kQueryStages], dout_full[kDoutStages];
  BackwardTile tile;
  int next_tile, window, window_begin;  // where the search for tiles goes on
};

}  // namespace dsv3rt
