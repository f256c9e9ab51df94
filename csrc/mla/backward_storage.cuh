// Shared memory of the two kernels of the backward pass, laid out as in the forward pass.
#pragma once

#include <cuda_bf16.h>

#include "hopper/barrier.cuh"
#include "mla/key_tiles.cuh"
#include "mla/query_tiles.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kBackwardConsumerWarps = 8;  // two warpgroups, of 64 rows each
constexpr int kKeyGradientThreads = 32 * kBackwardConsumerWarps;  // no producer: registers are short
constexpr int kQueryGradientThreads = 128 + 32 * kBackwardConsumerWarps;
constexpr int kBackwardStages = 3;
constexpr int kQueryStages = 4;  // of q in the kernel of keys, which needs it longest
constexpr int kGradientBlockKeys = 64;  // that queries meet at a time

using Slab128 = __nv_bfloat16[128 * kSlab];  // 128 rows
using Slab64 = __nv_bfloat16[64 * kSlab];
using GradientTile = QueryTile<kGradientBlockKeys>;

// Of a tile of queries, as the preparing kernel writes it.
struct QueryStatistics {
  float lse_log2[kBackwardQueries];
  float delta[kBackwardQueries];
};

// Gradients of keys: 128 keys stay, queries pass. Their statistics come with q.
struct KeyGradientStorage {
  alignas(1024) Slab128 k[kQueryDim / kSlab];
  alignas(1024) Slab128 v[kValueDim / kSlab];
  alignas(1024) Slab64 q[kQueryStages][kQueryDim / kSlab];
  alignas(1024) Slab64 dout[kBackwardStages][kValueDim / kSlab];
  alignas(128) QueryStatistics statistics[kQueryStages];
  Barrier keys_full, keys_empty;
  Barrier q_full[kQueryStages], dout_full[kBackwardStages];
  Barrier empty[kQueryStages];  // both of a block of queries, counted by its stage of q
  KeyTile tile[kTileSlots];
  int next_tile, window, window_begin;  // where the search for tiles goes on
};

// Gradients of queries: 128 queries stay, keys pass.
struct QueryGradientStorage {
  alignas(1024) Slab128 q[kQueryDim / kSlab];
  alignas(1024) Slab128 dout[kValueDim / kSlab];
  alignas(1024) Slab64 k[kBackwardStages][kQueryDim / kSlab];
  alignas(1024) Slab64 v[kBackwardStages][kValueDim / kSlab];
  Barrier tile_full[kTileSlots], tile_empty[kTileSlots];
  Barrier queries_full, queries_empty;
  Barrier full[kBackwardStages], empty[kBackwardStages];
  Barrier arrived;  // keys that the producer has to clear in part before it hands them on
  GradientTile tile[kTileSlots];
  int window, window_begin;  // where the search for tiles goes on
};

// Rows from `first` on belong to another sequence: zeros instead, because zero times NaN is NaN. Done by threads
// `thread`, of which there are kThreads.
template <int kThreads, int kSlabs, int kElements>
__device__ __forceinline__ void clear_rows(__nv_bfloat16 (&slabs)[kSlabs][kElements], int first, int thread) {
  constexpr int kChunks = kSlab * 2 / 16;
#pragma unroll 1
  for (int chunk = first * kChunks + thread; chunk < kElements / 8; chunk += kThreads) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) reinterpret_cast<uint4*>(slabs[slab])[chunk] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace dsv3rt
