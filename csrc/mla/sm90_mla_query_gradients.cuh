// Latent attention, gradients of queries, like the forward pass: one persistent block an SM, a producer warp that loads
// keys and values, two consumer warpgroups of 64 queries. Scores, weights and their gradients never leave registers.
// Gradients of out are kept there throughout; dq of one block of keys is multiplied while the next one's scores become
// weights and their gradients.
#pragma once

#include "hopper/arithmetic.cuh"
#include "hopper/fragment.cuh"
#include "hopper/ring.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/backward_products.cuh"
#include "mla/backward_storage.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

struct QueryGradientMaps {
  CUtensorMap q, dout, k_nope, k_rope, v;
};

using KeyScores = float[kGradientBlockKeys / 2];  // (queries, keys)
using DoutFragments = uint32_t[kValueDim / 16][4];  // a register operand along columns of values

// Of the thread's two rows.
struct RowStatistics {
  float lse_log2[2], delta[2];
};

// Walks through the tiles that another warp hands on. They stay in shared memory, read when needed: registers are
// short.
struct TileReader {
  QueryGradientStorage& storage;
  TwoStage slot;

  __device__ __forceinline__ const GradientTile& await_tile() {
    storage.tile_full[slot.stage()].wait(slot.full_parity());
    return storage.tile[slot.stage()];
  }

  __device__ __forceinline__ void release_tile() {
    __syncwarp();
    storage.tile_empty[slot.stage()].arrive_for_warp();
    ++slot.count;
  }
};

// Of one whole warp: hands tiles on until there are none, the last of which says so.
__device__ __forceinline__ void hand_tiles_on(QueryGradientStorage& storage, const MlaBackwardParams& params) {
  TwoStage slot;
  while (true) {
    GradientTile& tile = storage.tile[slot.stage()];
    storage.tile_empty[slot.stage()].wait(slot.empty_parity());
    int number = 0;
    if (threadIdx.x % 32 == 0) number = atomicAdd(params.tile_counters, 1);
    TileCursor cursor(params.q_ends, params.num_sequences, kTileQueries, params.num_heads, storage.window,
                      storage.window_begin);
    const TileCursor::Place found = cursor.find(__shfl_sync(~0u, number, 0));
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      place_query_tile(tile, params, found);
      storage.window = cursor.window();
      storage.window_begin = cursor.window_begin();
      storage.tile_full[slot.stage()].arrive();
    }
    __syncwarp();
    if (found.sequence < 0) return;
    ++slot.count;
  }
}

// What the warp that loads keeps.
struct QueryProducer : TileReader {
  const QueryGradientMaps& maps;
  RingPosition<kBackwardStages> ring;
  uint32_t queries_parity = 0, arrived_parity = 0;
};

// By a whole warp. Keys and values behind the end of the sequence are cleared before they are handed on.
__device__ __forceinline__ void load_key_block(QueryProducer& self, int num_keys, const GradientTile& tile, int block) {
  QueryGradientStorage& storage = self.storage;
  const int stage = self.ring.stage, row = tile.key + block * kGradientBlockKeys;
  const int left = tile.num_keys - block * kGradientBlockKeys;
  // Past the end of the array the engine pads with zeros.
  const bool clears = left < kGradientBlockKeys && tile.key + tile.num_keys < num_keys;
  storage.empty[stage].wait(self.ring.parity ^ 1);
  if (threadIdx.x % 32 == 0) {
    Barrier& arrived = clears ? storage.arrived : storage.full[stage];
    arrived.arrive_and_expect(sizeof(storage.k[0]) + sizeof(storage.v[0]));
    tma_load_4d(storage.k[stage][0], self.maps.k_nope, arrived, 0, row, 0, tile.head);
    tma_load_4d(storage.k[stage][kNopeDim / kSlab], self.maps.k_rope, arrived, 0, row, 0, 0);
    tma_load_4d(storage.v[stage][0], self.maps.v, arrived, 0, row, 0, tile.head);
  }
  if (clears) {
    storage.arrived.wait(self.arrived_parity);
    self.arrived_parity ^= 1;
    clear_rows<32>(storage.k[stage], left, threadIdx.x);
    clear_rows<32>(storage.v[stage], left, threadIdx.x);
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) storage.full[stage].arrive();
  }
  self.ring.advance();
}

// Rows behind the end of the sequence do no harm here: a query's numbers stay in its row, which is not stored.
__device__ __forceinline__ void load_query_tile(QueryProducer& self, const GradientTile& tile) {
  QueryGradientStorage& storage = self.storage;
  storage.queries_empty.wait(self.queries_parity ^ 1);
  self.queries_parity ^= 1;
  if (threadIdx.x % 32 != 0) return;
  storage.queries_full.arrive_and_expect(sizeof(storage.q) + sizeof(storage.dout));
  tma_load_4d(storage.q[0], self.maps.q, storage.queries_full, 0, tile.query, 0, tile.head, L2Hint::kEvictFirst);
  tma_load_4d(storage.dout[0], self.maps.dout, storage.queries_full, 0, tile.query, 0, tile.head, L2Hint::kEvictFirst);
}

// Blocks of keys from the last that is seen to the first.
__device__ __forceinline__ void load_tiles(QueryGradientStorage& storage, const QueryGradientMaps& maps,
                                           const MlaBackwardParams& params) {
  QueryProducer self{{storage}, maps};
  while (true) {
    const GradientTile& tile = self.await_tile();
    if (tile.num_blocks < 0) return;
    if (tile.num_blocks > 0) load_query_tile(self, tile);
#pragma unroll 1
    for (int block = tile.num_blocks - 1; block >= 0; --block) load_key_block(self, params.num_keys, tile, block);
    self.release_tile();
  }
}

// What a consumer warpgroup knows throughout.
struct QueryConsumer : TileReader {
  const MlaBackwardParams& params;
  int warpgroup;
  RingPosition<kBackwardStages> ring;  // of the block of keys that comes next
  uint32_t queries_parity = 0;

  __device__ __forceinline__ void release(Barrier& empty) const {
    __syncwarp();
    empty.arrive_for_warp();
  }
  // Row inside the tile of this thread's first accumulators.
  __device__ __forceinline__ int row() const {
    return warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }
};

__device__ __forceinline__ void start_key_scores(const QueryConsumer& self, KeyScores& scores, int stage) {
  const uint64_t q = k_major_swizzle128_descriptor(self.storage.q[0] + self.warpgroup * 64 * kSlab);
  const uint64_t k = k_major_swizzle128_descriptor(self.storage.k[stage][0]);
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kQueryDim / 16; ++step) {
    const int inside = step % 4 * 2, slab = step / 4;
    WgmmaBF16<kGradientBlockKeys, Major::kK>::multiply(scores, q + slab * (sizeof(Slab128) >> 4) + inside,
                                                       k + slab * (sizeof(Slab64) >> 4) + inside, step != 0);
  }
  wgmma_commit();
  pin_registers(scores);
}

__device__ __forceinline__ void start_dweights(const QueryConsumer& self, KeyScores& dweights,
                                               const DoutFragments& dout, int stage) {
  const uint64_t v = k_major_swizzle128_descriptor(self.storage.v[stage][0]);
  pin_registers(dweights);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kValueDim / 16; ++step) {
    WgmmaBF16<kGradientBlockKeys, Major::kK>::multiply(dweights, dout[step],
                                                       v + step / 4 * (sizeof(Slab64) >> 4) + step % 4 * 2, step != 0);
  }
  wgmma_commit();
  pin_registers(dweights);
}

// Out of rows of 128 bytes in 128-byte swizzle.
__device__ __forceinline__ void load_dout_fragments(const QueryConsumer& self, DoutFragments& dout) {
  const int lane = threadIdx.x % 32;
  const int row = self.warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane % 16;
  const uint32_t line = smem_address(self.storage.dout[0]) + row * 128;
#pragma unroll
  for (int step = 0; step < kValueDim / 16; ++step) {
    const int chunk = (step % 4 * 2 + lane / 16) ^ (row % 8);
    load_matrices(dout[step], line + step / 4 * sizeof(Slab128) + chunk * 16);
  }
}

// Weights exp2(scale * score - lse). Columns at or past `seen[row]`, counted from the thread's first, are hidden.
template <bool kMask>
__device__ __forceinline__ void take_key_weights(KeyScores& scores, const RowStatistics& statistics, float scale_log2,
                                                 const int (&seen)[2]) {
#pragma unroll
  for (int i = 0; i < kGradientBlockKeys / 2; ++i) {
    scores[i] = exp2_approx(fmaf(scores[i], scale_log2, -statistics.lse_log2[i / 2 % 2]));
    if (kMask && i / 4 * 8 + i % 2 >= seen[i / 2 % 2]) scores[i] = 0;
  }
}

// Gradients of weights become those of the scaled scores, without the scale: weight * (dweight - delta).
__device__ __forceinline__ void take_key_dscores(KeyScores& dweights, const KeyScores& weights,
                                                 const RowStatistics& statistics) {
#pragma unroll
  for (int i = 0; i < kGradientBlockKeys / 2; ++i) {
    dweights[i] = weights[i] * (dweights[i] - statistics.delta[i / 2 % 2]);
  }
}

struct QuerySums {
  float dq[kQueryDim / 2] = {};
  PackedBlock dscores;  // of the block before, whose product is still to be added
};

template <bool kFirst, bool kMask>
__device__ __forceinline__ void advance_keys(QueryConsumer& self, const GradientTile& tile, int block,
                                             const RowStatistics& statistics, const DoutFragments& dout,
                                             QuerySums& sums) {
  QueryGradientStorage& storage = self.storage;
  const int stage = self.ring.stage, stage_before = self.ring.stage_before();
  KeyScores scores, dweights;
  storage.full[stage].wait(self.ring.parity);
  start_key_scores(self, scores, stage);
  start_dweights(self, dweights, dout, stage);
  if constexpr (!kFirst) accumulate_rows<kQueryDim>(sums.dq, sums.dscores, storage.k[stage_before]);
  wgmma_wait<kFirst ? 1 : 2>();
  pin_registers(scores);
  int seen[2] = {};
  if constexpr (kMask) {
    const int first_column = block * kGradientBlockKeys + threadIdx.x % 4 * 2, row = self.row();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      seen[i] = min(tile.num_keys, tile.seen + (row + i * 8) * self.params.causal) - first_column;
    }
  }
  take_key_weights<kMask>(scores, statistics, self.params.scale * 1.44269504088896341f, seen);
  pin_registers(scores);
  storage.full[stage].wait(self.ring.parity);  // long true: a branch, behind which the assembler would else move work
  wgmma_wait<kFirst ? 0 : 1>();
  pin_registers(dweights);
  take_key_dscores(dweights, scores, statistics);
  pin_registers(dweights);
  if constexpr (!kFirst) {
    storage.full[stage].wait(self.ring.parity);
    wgmma_wait<0>();
    pin_registers(sums.dq);
    self.release(storage.empty[stage_before]);
  }
  pin_registers(dweights);
  pack_block(sums.dscores, dweights);
  self.ring.advance();
}

__device__ __forceinline__ RowStatistics statistics_of(const QueryConsumer& self, const GradientTile& tile) {
  const MlaBackwardParams& params = self.params;
  const int first = params.q_ends[tile.sequence], query = tile.query + self.warpgroup * 64;
  RowStatistics result = {{INFINITY, INFINITY}, {0, 0}};
  if (query >= tile.query_end) return result;  // there is no such tile of statistics
  const int64_t index =
      int64_t(tile.head) * params.num_tiles + tile_of(first, tile.sequence) + (query - first) / kBackwardQueries;
  const auto& rows = reinterpret_cast<const QueryStatistics*>(params.statistics)[index];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    result.lse_log2[i] = rows.lse_log2[self.row() % 64 + i * 8];
    result.delta[i] = rows.delta[self.row() % 64 + i * 8];
  }
  return result;
}

__device__ __forceinline__ void sum_over_keys(QueryConsumer& self, const GradientTile& tile, QuerySums& sums) {
  QueryGradientStorage& storage = self.storage;
  const RowStatistics statistics = statistics_of(self, tile);
  DoutFragments dout;
  storage.queries_full.wait(self.queries_parity);
  self.queries_parity ^= 1;
  load_dout_fragments(self, dout);
  const int num_whole_blocks = tile.num_whole_blocks();
  int block = tile.num_blocks - 1;
  advance_keys<true, true>(self, tile, block, statistics, dout, sums);
#pragma unroll 1
  for (--block; block >= num_whole_blocks; --block) {
    advance_keys<false, true>(self, tile, block, statistics, dout, sums);
  }
#pragma unroll 1
  for (; block >= 0; --block) advance_keys<false, false>(self, tile, block, statistics, dout, sums);
  const int stage_before = self.ring.stage_before();
  self.release(storage.queries_empty);
  accumulate_rows<kQueryDim>(sums.dq, sums.dscores, storage.k[stage_before]);
  wgmma_wait<0>();
  pin_registers(sums.dq);
  self.release(storage.empty[stage_before]);
}

__device__ __forceinline__ void consume_for_queries(QueryGradientStorage& storage, const MlaBackwardParams& params) {
  QueryConsumer self{{storage}, params, __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0)};
  const int64_t row_stride = int64_t(params.num_heads) * kQueryDim;
  while (true) {
    const GradientTile& tile = self.await_tile();
    if (tile.num_blocks < 0) return;
    QuerySums sums;
    if (tile.num_blocks > 0) sum_over_keys(self, tile, sums);
    auto* dq = static_cast<__nv_bfloat16*>(params.dq) + tile.query * row_stride + tile.head * kQueryDim;
    store_rows<kQueryDim / 8>(dq, row_stride, self.row(), tile.query_end - tile.query, sums.dq, 0, params.scale);
    self.release_tile();
  }
}

__global__ void __launch_bounds__(kQueryGradientThreads, 1)
    sm90_mla_query_gradients_kernel(const __grid_constant__ QueryGradientMaps maps,
                                    const __grid_constant__ MlaBackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<QueryGradientStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    storage.queries_full.init(1);
    storage.queries_empty.init(kBackwardConsumerWarps * kArrivalsOfAWarp);
    storage.arrived.init(1);
    storage.window = 0;
    storage.window_begin = 0;
    for (Barrier& barrier : storage.full) barrier.init(1);
    for (Barrier& barrier : storage.empty) barrier.init(kBackwardConsumerWarps * kArrivalsOfAWarp);
    for (Barrier& barrier : storage.tile_full) barrier.init(1);
    for (Barrier& barrier : storage.tile_empty)
      barrier.init((kBackwardConsumerWarps + 1) * kArrivalsOfAWarp);  // and the warp that loads
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    release_registers<24>();
    if (threadIdx.x < 32) load_tiles(storage, maps, params);
    if (threadIdx.x / 32 == 1) hand_tiles_on(storage, params);
  } else {
    claim_registers<240>();
    consume_for_queries(storage, params);
  }
}

}  // namespace dsv3rt
