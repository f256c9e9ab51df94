// Latent attention, gradients of keys and values. One persistent block an SM of two warpgroups that own 64 keys
// each; they load as well, because registers are short: the last warp that is done with a block of queries has the
// next one put in its place. For every 64 queries, transposed scores and weights
// stay in registers, and are the register operand of the products that sum dv and dk over queries. dk of one block of
// queries is multiplied while the scores of the next become weights, dv while their gradients become those of the
// scores.
#pragma once

#include "hopper/arithmetic.cuh"
#include "hopper/fragment.cuh"
#include "hopper/ring.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/backward_products.cuh"
#include "mla/backward_storage.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

struct KeyGradientMaps {
  CUtensorMap q, dout, k_nope, k_rope, v;
};

using TransposedScores = float[kBackwardQueries / 2];  // (keys, queries): rows are keys

// What a thread knows throughout.
struct KeyWarpgroup {
  KeyGradientStorage& storage;
  const KeyGradientMaps& maps;
  const MlaBackwardParams& params;
  int warpgroup;
  RingPosition<kQueryStages> q_ring;  // of the block of queries that comes next
  RingPosition<kBackwardStages> dout_ring;
  uint32_t keys_parity = 0;

  __device__ __forceinline__ void release(Barrier& empty) const {
    __syncwarp();
    empty.arrive_for_warp();
  }
  // Stages in uniform registers, where descriptors are computed from them.
  __device__ __forceinline__ void advance() {
    q_ring.advance();
    dout_ring.advance();
    q_ring.stage = __shfl_sync(~0u, q_ring.stage, 0);
    dout_ring.stage = __shfl_sync(~0u, dout_ring.stage, 0);
  }
  // Row inside the tile of this thread's first accumulators.
  __device__ __forceinline__ int row() const { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }
};

// By one warp, which writes the tile of the next number.
__device__ __forceinline__ void fetch_tile(KeyGradientStorage& storage, const MlaBackwardParams& params, int slot) {
  TileCursor cursor(params.k_ends, params.num_sequences, kGradientKeys, params.num_heads, storage.window,
                    storage.window_begin);
  const KeyTile tile = place_key_tile(params, cursor.find(storage.next_tile));
  __syncwarp();
  if (threadIdx.x == 0) {
    storage.tile[slot] = tile;
    storage.window = cursor.window();
    storage.window_begin = cursor.window_begin();
    storage.next_tile = gridDim.x + atomicAdd(params.tile_counters + 1, 1);
  }
}

// Everything is loaded by one thread.
__device__ __forceinline__ void load_q(const KeyWarpgroup& self, const KeyTile& tile, int block, int stage) {
  KeyGradientStorage& storage = self.storage;
  Barrier& full = storage.q_full[stage];
  full.arrive_and_expect(sizeof(storage.q[0]) + sizeof(QueryStatistics));
  tma_load_4d(storage.q[stage][0], self.maps.q, full, 0, tile.query + block * kBackwardQueries, 0, tile.head);
  const int64_t index = int64_t(tile.head) * self.params.num_tiles + tile.query_tile + block;
  bulk_load(&storage.statistics[stage], self.params.statistics + index * (sizeof(QueryStatistics) / 4),
            sizeof(QueryStatistics), full);
}

__device__ __forceinline__ void load_dout(const KeyWarpgroup& self, const KeyTile& tile, int block, int stage) {
  KeyGradientStorage& storage = self.storage;
  Barrier& full = storage.dout_full[stage];
  full.arrive_and_expect(sizeof(storage.dout[0]));
  tma_load_4d(storage.dout[stage][0], self.maps.dout, full, 0, tile.query + block * kBackwardQueries, 0, tile.head);
}

// How many blocks ahead of the one that is computed: of q three, of dout two.
constexpr int kQueriesAhead = kQueryStages - 1, kDoutAhead = kBackwardStages - 1;

// Keys and the first blocks of queries, for which `self`'s stages and the next ones must be free but the last. Keys
// behind the end of the sequence do no harm: a key's numbers stay in its row, which is not stored.
__device__ __forceinline__ void load_first(const KeyWarpgroup& self, const KeyTile& tile) {
  KeyGradientStorage& storage = self.storage;
  if (tile.head < 0 || tile.first_block >= tile.end_block) return;
  storage.keys_full.arrive_and_expect(sizeof(storage.k) + sizeof(storage.v));
  tma_load_4d(storage.k[0], self.maps.k_nope, storage.keys_full, 0, tile.key, 0, tile.head);
  tma_load_4d(storage.k[kNopeDim / kSlab], self.maps.k_rope, storage.keys_full, 0, tile.key, 0, 0);
  tma_load_4d(storage.v[0], self.maps.v, storage.keys_full, 0, tile.key, 0, tile.head);
#pragma unroll
  for (int ahead = 0; ahead < kQueriesAhead; ++ahead) {
    const int block = tile.first_block + ahead;
    if (block >= tile.end_block) break;
    load_q(self, tile, block, (self.q_ring.stage + ahead) % kQueryStages);
    if (ahead < kDoutAhead) load_dout(self, tile, block, (self.dout_ring.stage + ahead) % kBackwardStages);
  }
}

// Puts the next blocks where the block before the current one lay.
__device__ __forceinline__ void load_ahead(const KeyWarpgroup& self, const KeyTile& tile, int block) {
  if (block + kQueriesAhead < tile.end_block) {
    load_q(self, tile, block + kQueriesAhead, self.q_ring.stage_before());
  }
  if (block + kDoutAhead < tile.end_block) load_dout(self, tile, block + kDoutAhead, self.dout_ring.stage_before());
}

// Whether this thread is to load ahead: the last one to be done with the block before. Before the first block of a tile
// nobody uses its stages.
template <bool kFirst>
__device__ __forceinline__ bool release_block_before(const KeyWarpgroup& self) {
  __syncwarp();
  if (kFirst) return threadIdx.x == 0;
  Barrier& empty = self.storage.empty[self.q_ring.stage_before()];
  if constexpr (kAllLanesArrive) {
    if (threadIdx.x % 32 != 0) empty.arrive();
    __syncwarp();  // a warp's first lane is its last to arrive
  }
  return threadIdx.x % 32 == 0 && empty.arrive_as_last();
}

// Those queries of the last block that lie behind the end of the sequence, where other sequences follow.
__device__ __forceinline__ void clear_queries(const KeyWarpgroup& self, const KeyTile& tile) {
  KeyGradientStorage& storage = self.storage;
  const int left = tile.num_queries - (tile.end_block - 1) * kBackwardQueries;
  if (left >= kBackwardQueries || tile.query + tile.num_queries >= self.params.num_queries) return;
  storage.dout_full[self.dout_ring.stage].wait(self.dout_ring.parity);
  clear_rows<kKeyGradientThreads>(storage.q[self.q_ring.stage], left, threadIdx.x);
  clear_rows<kKeyGradientThreads>(storage.dout[self.dout_ring.stage], left, threadIdx.x);
  fence_async_proxy();
  __syncthreads();
}

// Products of the warpgroup's 64 rows of keys or values with 64 queries or their gradients.
template <int kSlabs>
__device__ __forceinline__ void start_transposed(TransposedScores& scores, const Slab128 (&keys)[kSlabs],
                                                 const Slab64 (&queries)[kSlabs], int warpgroup) {
  const uint64_t a = k_major_swizzle128_descriptor(keys[0] + warpgroup * 64 * kSlab);
  const uint64_t b = k_major_swizzle128_descriptor(queries[0]);
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSlabs * 4; ++step) {
    WgmmaBF16<kBackwardQueries, Major::kK>::multiply(scores, a + step / 4 * (sizeof(Slab128) >> 4) + step % 4 * 2,
                                                     b + step / 4 * (sizeof(Slab64) >> 4) + step % 4 * 2, step != 0);
  }
  wgmma_commit();
  pin_registers(scores);
}

// A number for each of this thread's columns.
using ColumnPairs = float2[kBackwardQueries / 8];

__device__ __forceinline__ void load_columns(ColumnPairs& pairs, const float (&values)[kBackwardQueries]) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
    pairs[octet] = *reinterpret_cast<const float2*>(&values[octet * 8 + threadIdx.x % 4 * 2]);
  }
}

// Weights exp2(scale * score - lse) of a column's query. Zero where the key is hidden: in the thread's first row from
// columns up to and including `hidden_to`, counted from the thread's first; eight more in its second.
template <bool kMask>
__device__ __forceinline__ void take_weights(TransposedScores& scores, const ColumnPairs& lse_log2, float scale_log2,
                                             int hidden_to) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[octet * 4 + i];
      score = exp2_approx(fmaf(score, scale_log2, -(i % 2 ? lse_log2[octet].y : lse_log2[octet].x)));
      if (kMask && octet * 8 + i % 2 - i / 2 * 8 <= hidden_to) score = 0;
    }
  }
}

// Weights become the gradients of the scaled scores, without the scale: weight * (dweight - delta), in BF16 both
// factors and the product.
__device__ __forceinline__ void take_dscores(PackedBlock& weights, const TransposedScores& dweights,
                                             const ColumnPairs& delta) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float* pair = &dweights[octet * 4 + row * 2];
      uint32_t& weight = weights[octet / 2][octet % 2 * 2 + row];
      weight = multiply_bf16(weight, pack_bf16(pair[0] - delta[octet].x, pair[1] - delta[octet].y));
    }
  }
}

struct KeySums {
  float dk[kQueryDim / 2] = {};
  float dv[kValueDim / 2] = {};
  TransposedScores scores;  // and gradients of weights
  PackedBlock packed;  // weights; then gradients of the scores, whose product with the queries is still to be added
};

template <bool kFirst, bool kMask>
__device__ __forceinline__ void advance_queries(KeyWarpgroup& self, const KeyTile& tile, int block, int end_block,
                                                KeySums& sums) {
  KeyGradientStorage& storage = self.storage;
  const int q_stage = self.q_ring.stage, dout_stage = self.dout_ring.stage;
  // Loads from shared memory queue up behind the products that a warp has issued: what is to be read comes first.
  storage.q_full[q_stage].wait(self.q_ring.parity);
  if (block == end_block - 1) clear_queries(self, tile);
  ColumnPairs columns;
  load_columns(columns, storage.statistics[q_stage].lse_log2);
  start_transposed(sums.scores, storage.k, storage.q[q_stage], self.warpgroup);
  if constexpr (!kFirst) accumulate_rows<kQueryDim>(sums.dk, sums.packed, storage.q[self.q_ring.stage_before()]);
  wgmma_wait<kFirst ? 0 : 1>();
  pin_registers(sums.scores);
  // Query `column` of the block sees the key when key < seen + first query of the block + column.
  const int hidden_to =
      kMask ? self.row() - tile.seen - block * kBackwardQueries - static_cast<int>(threadIdx.x % 4 * 2) : 0;
  take_weights<kMask>(sums.scores, columns, self.params.scale * 1.44269504088896341f, hidden_to);
  pin_registers(sums.scores);
  storage.dout_full[dout_stage].wait(self.dout_ring.parity);
  if constexpr (!kFirst) {
    wgmma_wait<0>();
    pin_registers(sums.dk);
  }
  pin_registers(sums.scores);
  pack_block(sums.packed, sums.scores);
  const bool loads = release_block_before<kFirst>(self);
  load_columns(columns, storage.statistics[q_stage].delta);
  start_transposed(sums.scores, storage.v, storage.dout[dout_stage], self.warpgroup);
  accumulate_rows<kValueDim>(sums.dv, sums.packed, storage.dout[dout_stage]);
  if (loads) [[unlikely]] {
    // Long true: makes what the other warps did visible.
    if (!kFirst) storage.empty[self.q_ring.stage_before()].wait(self.q_ring.parity ^ (q_stage == 0));
    load_ahead(self, tile, block);
  }
  __syncwarp();
  wgmma_wait<1>();
  pin_registers(sums.scores);
  PackedBlock dscores;
#pragma unroll
  for (int i = 0; i < 16; ++i) dscores[i / 4][i % 4] = sums.packed[i / 4][i % 4];
  take_dscores(dscores, sums.scores, columns);
  storage.q_full[q_stage].wait(self.q_ring.parity);  // long true: a branch, behind which the assembler moves no work
  wgmma_wait<0>();
  pin_registers(sums.dv);
#pragma unroll
  for (int i = 0; i < 16; ++i) sums.packed[i / 4][i % 4] = dscores[i / 4][i % 4];
  self.advance();
}

__device__ __forceinline__ void sum_over_queries(KeyWarpgroup& self, const KeyTile& tile, const KeyTile& next_tile,
                                                 KeySums& sums) {
  KeyGradientStorage& storage = self.storage;
  int block = tile.first_block;
  const int end_block = tile.end_block, masked_end = tile.masked_end;
  storage.keys_full.wait(self.keys_parity);
  advance_queries<true, true>(self, tile, block, end_block, sums);
#pragma unroll 1
  for (++block; block < masked_end; ++block) advance_queries<false, true>(self, tile, block, end_block, sums);
#pragma unroll 1
  for (; block < end_block; ++block) advance_queries<false, false>(self, tile, block, end_block, sums);
  self.release(storage.keys_empty);
  if (threadIdx.x == 0) {  // what waits for all warps has them behind the last block but one as well
    storage.keys_empty.wait(self.keys_parity);
    load_first(self, next_tile);
  }
  __syncwarp();
  self.keys_parity ^= 1;
  const int stage_before = self.q_ring.stage_before();
  accumulate_rows<kQueryDim>(sums.dk, sums.packed, storage.q[stage_before]);
  wgmma_wait<0>();
  pin_registers(sums.dk);
  self.release(storage.empty[stage_before]);
}

__device__ __forceinline__ void finish_keys(const KeyWarpgroup& self, const KeyTile& tile, const KeySums& sums) {
  const MlaBackwardParams& params = self.params;
  const int64_t offset = tile.key * params.dkv_row_stride + tile.head * params.dkv_head_stride;
  auto* dk = static_cast<__nv_bfloat16*>(params.dk_nope) + offset;
  auto* dv = static_cast<__nv_bfloat16*>(params.dv) + offset;
  const int row = self.row();
  store_rows<kNopeDim / 8>(dk, params.dkv_row_stride, row, tile.num_keys, sums.dk, 0, params.scale);
  store_rows<kValueDim / 8>(dv, params.dkv_row_stride, row, tile.num_keys, sums.dv, 0, 1.0f);
  float* dk_rope = params.dk_rope_parts + (int64_t(tile.head) * params.num_keys + tile.key + row) * kRopeDim;
#pragma unroll
  for (int i = kNopeDim / 2; i < kQueryDim / 2; i += 4) {
    float* target = dk_rope + (i / 4 - kNopeDim / 8) * 8 + threadIdx.x % 4 * 2;
    if (row < tile.num_keys) *reinterpret_cast<float2*>(target) = make_float2(sums.dk[i], sums.dk[i + 1]);
    if (row + 8 < tile.num_keys) {
      *reinterpret_cast<float2*>(target + 8 * kRopeDim) = make_float2(sums.dk[i + 2], sums.dk[i + 3]);
    }
  }
}

__global__ void __launch_bounds__(kKeyGradientThreads, 1)
    sm90_mla_key_gradients_kernel(const __grid_constant__ KeyGradientMaps maps,
                                  const __grid_constant__ MlaBackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<KeyGradientStorage*>(shared_bytes);
  KeyWarpgroup self{storage, maps, params, __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0)};
  if (threadIdx.x == 0) {
    storage.keys_full.init(1);
    storage.keys_empty.init(kBackwardConsumerWarps * kArrivalsOfAWarp);
    for (Barrier& barrier : storage.q_full) barrier.init(1);
    for (Barrier& barrier : storage.dout_full) barrier.init(1);
    for (Barrier& barrier : storage.empty) barrier.init(kBackwardConsumerWarps * kArrivalsOfAWarp);
    fence_barrier_init();
    storage.next_tile = blockIdx.x;
    storage.window = 0;
    storage.window_begin = 0;
  }
  __syncwarp();
  if (threadIdx.x < 32) fetch_tile(storage, params, 0);
  if (threadIdx.x == 0) load_first(self, storage.tile[0]);
  int slot = 0;
  while (true) {
    __syncthreads();  // the tile is there, and nobody reads the one before
    const KeyTile &tile = storage.tile[slot], &next_tile = storage.tile[slot ^ 1];
    if (tile.head < 0) return;
    if (threadIdx.x < 32) fetch_tile(storage, params, slot ^ 1);
    __syncwarp();
    KeySums sums;
    if (tile.first_block < tile.end_block) {
      sum_over_queries(self, tile, next_tile, sums);
    } else if (threadIdx.x == 0) {
      load_first(self, next_tile);
    }
    __syncwarp();
    finish_keys(self, tile, sums);
    slot ^= 1;
  }
}

}  // namespace dsv3rt
