// Latent attention, gradients of keys and values. One persistent block an SM: a producer warp loads, two consumer
// warpgroups own 64 keys each. For every 64 queries, transposed scores and weights stay in registers, and are the
// register operand of the products that sum dv and dk over queries. dk of one block of queries is multiplied while the
// scores of the next become weights, dv while their gradients become those of the scores.
#pragma once

#include "hopper/arithmetic.cuh"
#include "hopper/fragment.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/backward_products.cuh"
#include "mla/backward_storage.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

struct KeyGradientMaps {
  CUtensorMap q, dout, k_nope, k_rope, v;
};

using KeyConsumer = BackwardConsumer<KeyGradientStorage, KeyTile>;
using TransposedScores = float[kBackwardQueries / 2];  // (keys, queries): rows are keys

// Rows behind the end of the sequence do no harm here: a key's numbers stay in its row, which is not stored.
__device__ __forceinline__ void load_keys(KeyGradientStorage& storage, const KeyGradientMaps& maps,
                                          const KeyTile& tile, BackwardProducer<KeyTile>& producer) {
  Barrier& full = storage.barriers.operands_full;
  producer.await_operands_empty();
  if (threadIdx.x % 32 != 0) return;
  full.arrive_and_expect(sizeof(storage.k) + sizeof(storage.v));
  tma_load_4d(storage.k[0], maps.k_nope, full, 0, tile.key, 0, tile.head);
  tma_load_4d(storage.k[kNopeDim / kSlab], maps.k_rope, full, 0, tile.key, 0, 0);
  tma_load_4d(storage.v[0], maps.v, full, 0, tile.key, 0, tile.head);
}

__device__ __forceinline__ void load_queries(KeyGradientStorage& storage, const KeyGradientMaps& maps,
                                             const MlaBackwardParams& params, const KeyTile& tile, int block,
                                             BackwardProducer<KeyTile>& producer) {
  const int stage = producer.ring.stage, row = tile.query + block * kBackwardQueries;
  const auto load = [&](Barrier& full) {
    tma_load_4d(storage.q[stage][0], maps.q, full, 0, row, 0, tile.head);
    tma_load_4d(storage.dout[stage][0], maps.dout, full, 0, row, 0, tile.head);
    const int64_t index = int64_t(tile.head) * params.num_tiles + tile.query_tile + block;
    bulk_load(&storage.statistics[stage], params.statistics + index * (sizeof(QueryStatistics) / 4),
              sizeof(QueryStatistics), full);
  };
  storage.barriers.empty[stage].wait(producer.ring.parity ^ 1);
  const bool ends_array = tile.query + tile.num_queries >= params.num_queries;  // the engine pads with zeros
  producer.fill(storage.barriers.full[stage],
                sizeof(storage.q[0]) + sizeof(storage.dout[0]) + sizeof(QueryStatistics), load,
                ends_array ? kBackwardQueries : tile.num_queries - block * kBackwardQueries, storage.q[stage],
                storage.dout[stage]);
  producer.ring.advance();
}

__device__ __forceinline__ void load_for_keys(KeyGradientStorage& storage, const KeyGradientMaps& maps,
                                              const MlaBackwardParams& params) {
  BackwardProducer<KeyTile> producer{{storage.barriers}};
  while (true) {
    const KeyTile& tile = producer.await_tile();
    if (tile.is_none()) return;
    if (tile.first_block < tile.end_block) load_keys(storage, maps, tile, producer);
#pragma unroll 1
    for (int block = tile.first_block; block < tile.end_block; ++block) {
      load_queries(storage, maps, params, tile, block, producer);
    }
    producer.release_tile();
  }
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
__device__ __forceinline__ void advance_queries(KeyConsumer& self, const KeyTile& tile, int block,
                                                KeySums& sums) {
  KeyGradientStorage& storage = self.storage;
  const int stage = self.ring.stage, stage_before = self.ring.stage_before();
  storage.barriers.full[stage].wait(self.ring.parity);
  start_transposed(sums.scores, storage.k, storage.q[stage], self.warpgroup);
  if constexpr (!kFirst) accumulate_rows<kQueryDim>(sums.dk, sums.packed, storage.q[stage_before]);
  wgmma_wait<kFirst ? 0 : 1>();
  pin_registers(sums.scores);
  // Query `column` of the block sees the key when key < seen + first query of the block + column.
  const int hidden_to = self.row() - tile.seen - block * kBackwardQueries - static_cast<int>(threadIdx.x % 4 * 2);
  take_weights<kMask>(sums.scores, storage.statistics[stage], self.params.scale * 1.44269504088896341f, hidden_to);
  pin_registers(sums.scores);
  if constexpr (!kFirst) {
    wgmma_wait<0>();
    pin_registers(sums.dk);
    self.release(storage.barriers.empty[stage_before]);
  }
  pin_registers(sums.scores);
  pack_block(sums.packed, sums.scores);
  start_transposed(sums.scores, storage.v, storage.dout[stage], self.warpgroup);
  accumulate_rows<kValueDim>(sums.dv, sums.packed, storage.dout[stage]);
  wgmma_wait<1>();
  pin_registers(sums.scores);
  take_dscores(sums.scores, sums.packed, storage.statistics[stage]);
  pin_registers(sums.scores);
  wgmma_wait<0>();
  pin_registers(sums.dv);
  pin_registers(sums.scores);
  pack_block(sums.packed, sums.scores);
  self.ring.advance();
}

__device__ __forceinline__ void sum_over_queries(KeyConsumer& self, const KeyTile& tile, KeySums& sums) {
  KeyGradientStorage& storage = self.storage;
  int block = tile.first_block;
  self.await_operands();
  advance_queries<true, true>(self, tile, block, sums);
#pragma unroll 1
  for (++block; block < tile.masked_end; ++block) advance_queries<false, true>(self, tile, block, sums);
#pragma unroll 1
  for (; block < tile.end_block; ++block) advance_queries<false, false>(self, tile, block, sums);
  const int stage_before = self.ring.stage_before();
  self.release(storage.barriers.operands_empty);
  accumulate_rows<kQueryDim>(sums.dk, sums.packed, storage.q[stage_before]);
  wgmma_wait<0>();
  pin_registers(sums.dk);
  self.release(storage.barriers.empty[stage_before]);
}

__device__ __forceinline__ void finish_keys(const KeyConsumer& self, const KeyTile& tile, const KeySums& sums) {
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

__device__ __forceinline__ void consume_for_keys(KeyGradientStorage& storage, const MlaBackwardParams& params) {
  KeyConsumer self(storage, params);
  while (true) {
    const KeyTile& tile = self.await_tile();
    if (tile.is_none()) return;
    KeySums sums;
    if (tile.first_block < tile.end_block) sum_over_queries(self, tile, sums);
    finish_keys(self, tile, sums);
    self.release_tile();
  }
}

__global__ void __launch_bounds__(kBackwardThreads, 1)
    sm90_mla_key_gradients_kernel(const __grid_constant__ KeyGradientMaps maps,
                                  const __grid_constant__ MlaBackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<KeyGradientStorage*>(shared_bytes);
  if (threadIdx.x == 0) storage.barriers.init();
  __syncthreads();
  if (threadIdx.x < 128) {
    release_registers<24>();
    if (threadIdx.x < 32) load_for_keys(storage, maps, params);
    if (threadIdx.x / 32 == 1) hand_tiles_on(storage.barriers, KeyTileScheduler(params, params.tile_counters));
  } else {
    claim_registers<240>();
    consume_for_keys(storage, params);
  }
}

}  // namespace dsv3rt
