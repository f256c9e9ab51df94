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
  RingPosition<kBackwardStages> ring;  // of the block of queries that comes next
  uint32_t keys_parity = 0;

  __device__ __forceinline__ int index() const { return __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0); }
  __device__ __forceinline__ void release(Barrier& empty) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
  }
  // The parity of the block before.
  __device__ __forceinline__ uint32_t parity_before() const { return ring.parity ^ (ring.stage == 0); }
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

// The rest is loaded by one thread.
__device__ __forceinline__ void load_queries(const KeyWarpgroup& self, const KeyTile& tile, int block, int stage) {
  KeyGradientStorage& storage = self.storage;
  Barrier& full = storage.full[stage];
  const int row = tile.query + block * kBackwardQueries;
  full.arrive_and_expect(sizeof(storage.q[0]) + sizeof(storage.dout[0]) + sizeof(QueryStatistics));
  tma_load_4d(storage.q[stage][0], self.maps.q, full, 0, row, 0, tile.head);
  tma_load_4d(storage.dout[stage][0], self.maps.dout, full, 0, row, 0, tile.head);
  const int64_t index = int64_t(tile.head) * self.params.num_tiles + tile.query_tile + block;
  bulk_load(&storage.statistics[stage], self.params.statistics + index * (sizeof(QueryStatistics) / 4),
            sizeof(QueryStatistics), full);
}

// Keys and the first two blocks of queries, for which `self.ring` and the next stage must be free. Keys behind the end
// of the sequence do no harm: a key's numbers stay in its row, which is not stored.
__device__ __forceinline__ void load_first(const KeyWarpgroup& self, const KeyTile& tile) {
  KeyGradientStorage& storage = self.storage;
  if (tile.head < 0 || tile.first_block >= tile.end_block) return;
  storage.keys_full.arrive_and_expect(sizeof(storage.k) + sizeof(storage.v));
  tma_load_4d(storage.k[0], self.maps.k_nope, storage.keys_full, 0, tile.key, 0, tile.head);
  tma_load_4d(storage.k[kNopeDim / kSlab], self.maps.k_rope, storage.keys_full, 0, tile.key, 0, 0);
  load_queries(self, tile, tile.first_block, self.ring.stage);
  tma_load_4d(storage.v[0], self.maps.v, storage.keys_full, 0, tile.key, 0, tile.head);
  if (tile.first_block + 1 < tile.end_block) {
    load_queries(self, tile, tile.first_block + 1, (self.ring.stage + 1) % kBackwardStages);
  }
}

// Two blocks ahead of the one at `self.ring`, where the block before that lay. Before the first block of a tile nobody
// uses that stage.
template <bool kFirst>
__device__ __forceinline__ void load_ahead(const KeyWarpgroup& self, const KeyTile& tile, int block, int stage_before) {
  Barrier& empty = self.storage.empty[stage_before];
  __syncwarp();
  if (kFirst ? threadIdx.x == 0 : threadIdx.x % 32 == 0 && empty.arrive_as_last()) {
    if (!kFirst) empty.wait(self.parity_before());  // done: makes what the other warps did visible
    if (block + 2 < tile.end_block) load_queries(self, tile, block + 2, stage_before);
  }
  __syncwarp();
}

// Waits for a block of queries. Those behind the end of the sequence are cleared.
__device__ __forceinline__ void await_queries(const KeyWarpgroup& self, const KeyTile& tile, int block) {
  KeyGradientStorage& storage = self.storage;
  const int stage = self.ring.stage, left = tile.num_queries - block * kBackwardQueries;
  storage.full[stage].wait(self.ring.parity);
  if (left >= kBackwardQueries || tile.query + tile.num_queries >= self.params.num_queries) return;
  clear_rows<kKeyGradientThreads>(storage.q[stage], left, threadIdx.x);
  clear_rows<kKeyGradientThreads>(storage.dout[stage], left, threadIdx.x);
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

// Weights exp2(scale * score - lse) of a column's query. Zero where the key is hidden: in the thread's first row from
// columns up to and including `hidden_to`, counted from the thread's first; eight more in its second.
template <bool kMask>
__device__ __forceinline__ void take_weights(TransposedScores& scores, const QueryStatistics& statistics,
                                             float scale_log2, int hidden_to) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
    const float2 lse = *reinterpret_cast<const float2*>(&statistics.lse_log2[octet * 8 + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[octet * 4 + i];
      score = exp2_approx(fmaf(score, scale_log2, -(i % 2 ? lse.y : lse.x)));
      if (kMask && octet * 8 + i % 2 - i / 2 * 8 <= hidden_to) score = 0;
    }
  }
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

// Gradients of weights become those of the scaled scores, without the scale: weight * (dweight - delta).
__device__ __forceinline__ void take_dscores(TransposedScores& dweights, const PackedBlock& weights,
                                             const QueryStatistics& statistics) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
    const float2 delta = *reinterpret_cast<const float2*>(&statistics.delta[octet * 8 + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float2 weight = unpack_bf16(weights[octet / 2][octet % 2 * 2 + row]);
      float* pair = &dweights[octet * 4 + row * 2];
      pair[0] = weight.x * (pair[0] - delta.x);
      pair[1] = weight.y * (pair[1] - delta.y);
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
__device__ __forceinline__ void advance_queries(KeyWarpgroup& self, const KeyTile& tile, int block, KeySums& sums) {
  KeyGradientStorage& storage = self.storage;
  // In a uniform register, where descriptors are computed from it.
  const int stage = __shfl_sync(~0u, self.ring.stage, 0), stage_before = stage == 0 ? kBackwardStages - 1 : stage - 1;
  await_queries(self, tile, block);
  start_transposed(sums.scores, storage.k, storage.q[stage], self.index());
  if constexpr (!kFirst) accumulate_rows<kQueryDim>(sums.dk, sums.packed, storage.q[stage_before]);
  wgmma_wait<kFirst ? 0 : 1>();
  pin_registers(sums.scores);
  // Query `column` of the block sees the key when key < seen + first query of the block + column.
  const int hidden_to = self.row() - tile.seen - block * kBackwardQueries - static_cast<int>(threadIdx.x % 4 * 2);
  take_weights<kMask>(sums.scores, storage.statistics[stage], self.params.scale * 1.44269504088896341f, hidden_to);
  pin_registers(sums.scores);
  if constexpr (!kFirst) {
    storage.full[stage].wait(self.ring.parity);  // long true: a branch, behind which the assembler would else move work
    wgmma_wait<0>();
    pin_registers(sums.dk);
  }
  pin_registers(sums.scores);
  pack_block(sums.packed, sums.scores);
  start_transposed(sums.scores, storage.v, storage.dout[stage], self.index());
  accumulate_rows<kValueDim>(sums.dv, sums.packed, storage.dout[stage]);
  load_ahead<kFirst>(self, tile, block, stage_before);
  wgmma_wait<1>();
  pin_registers(sums.scores);
  take_dscores(sums.scores, sums.packed, storage.statistics[stage]);
  pin_registers(sums.scores);
  storage.full[stage].wait(self.ring.parity);
  wgmma_wait<0>();
  pin_registers(sums.dv);
  pin_registers(sums.scores);
  pack_block(sums.packed, sums.scores);
  self.ring.advance();
}

__device__ __forceinline__ void sum_over_queries(KeyWarpgroup& self, const KeyTile& tile, const KeyTile& next_tile,
                                                 KeySums& sums) {
  KeyGradientStorage& storage = self.storage;
  int block = tile.first_block;
  storage.keys_full.wait(self.keys_parity);
  advance_queries<true, true>(self, tile, block, sums);
#pragma unroll 1
  for (++block; block < tile.masked_end; ++block) advance_queries<false, true>(self, tile, block, sums);
#pragma unroll 1
  for (; block < tile.end_block; ++block) advance_queries<false, false>(self, tile, block, sums);
  const int stage_before = self.ring.stage_before();
  self.release(storage.keys_empty);
  if (threadIdx.x == 0) {  // what waits for all warps has them behind the last block but one as well
    storage.keys_empty.wait(self.keys_parity);
    load_first(self, next_tile);
  }
  __syncwarp();
  self.keys_parity ^= 1;
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
  KeyWarpgroup self{storage, maps, params};
  if (threadIdx.x == 0) {
    storage.keys_full.init(1);
    storage.keys_empty.init(kBackwardConsumerWarps);
    for (Barrier& barrier : storage.full) barrier.init(1);
    for (Barrier& barrier : storage.empty) barrier.init(kBackwardConsumerWarps);
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
