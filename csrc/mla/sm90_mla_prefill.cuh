// Latent attention, forward. One persistent block an SM: a producer warp loads keys and values through the copy engine,
// two consumer warpgroups of 64 queries multiply. Scores never leave registers: the tensor cores compute the scores of
// one block of keys while the CUDA cores turn those of the block before into weights, and take the weights as a
// register operand of the product with the values.
#pragma once

#include "hopper/fragment.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/prefill_storage.cuh"
#include "mla/softmax.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

struct PrefillMaps {
  CUtensorMap q, k_nope, k_rope, v;
};

constexpr int kScoreFragment = kTileKeys / 2, kOutFragment = kValueDim / 2;  // accumulators a thread
constexpr int kConsumerBarrier = 1;  // named

__device__ __forceinline__ void producer_load_keys(PrefillStorage& storage, const PrefillMaps& maps,
                                                   const PrefillTile& tile, int block, TwoStage ring) {
  Barrier& full = storage.k_full[ring.stage()];
  storage.k_empty[ring.stage()].wait(ring.empty_parity());
  full.arrive_and_expect(sizeof(storage.k[0]));
  const int row = tile.key + block * kTileKeys;
  tma_load_4d(storage.k[ring.stage()][0], maps.k_nope, full, 0, row, 0, tile.head);
  tma_load_4d(storage.k[ring.stage()][kNopeDim / kSlab], maps.k_rope, full, 0, row, 0, 0);
}

__device__ __forceinline__ void producer_load_values(PrefillStorage& storage, const PrefillMaps& maps,
                                                     const PrefillTile& tile, int block, TwoStage ring) {
  Barrier& full = storage.v_full[ring.stage()];
  storage.v_empty[ring.stage()].wait(ring.empty_parity());
  full.arrive_and_expect(sizeof(storage.v[0]));
  tma_load_4d(storage.v[ring.stage()][0], maps.v, full, 0, tile.key + block * kTileKeys, 0, tile.head);
}

// Blocks of keys from the last that is seen to the first; values one block behind the keys, as they are needed.
__device__ __forceinline__ void producer_load_tile(PrefillStorage& storage, const PrefillMaps& maps,
                                                   const PrefillTile& tile, TwoStage& ring, uint32_t& q_parity) {
  int block = tile.num_blocks - 1;
  producer_load_keys(storage, maps, tile, block, ring);
  storage.q_empty.wait(q_parity ^ 1);
  storage.q_full.arrive_and_expect(sizeof(storage.q));
  tma_load_4d(storage.q[0], maps.q, storage.q_full, 0, tile.query, 0, tile.head, L2Hint::kEvictFirst);
  q_parity ^= 1;
#pragma unroll 1
  for (; block > 0; --block) {
    const TwoStage behind = ring;
    ++ring.count;
    producer_load_keys(storage, maps, tile, block - 1, ring);
    producer_load_values(storage, maps, tile, block, behind);
  }
  producer_load_values(storage, maps, tile, 0, ring);
  ++ring.count;
}

__device__ __forceinline__ void producer_load_tiles(PrefillStorage& storage, const PrefillMaps& maps,
                                                    const MlaPrefillParams& params) {
  TileCursor cursor(params.q_ends, params.num_sequences, kTileQueries, params.num_heads);
  TileNumbers numbers(params.tile_counter);
  TwoStage slot, ring;
  uint32_t q_parity = 0;
  while (true) {
    PrefillTile tile;
    place_query_tile(tile, params, cursor.find(numbers.next()));
    if (threadIdx.x == 0) {
      storage.tile_empty[slot.stage()].wait(slot.empty_parity());
      storage.tile[slot.stage()] = tile;
      storage.tile_full[slot.stage()].arrive();
      if (tile.num_blocks > 0) producer_load_tile(storage, maps, tile, ring, q_parity);
    }
    __syncwarp();
    if (tile.num_blocks < 0) return;
    ++slot.count;
  }
}

// What a consumer warpgroup knows throughout.
struct PrefillConsumer {
  PrefillStorage& storage;
  const MlaPrefillParams& params;
  int warpgroup;
  TwoStage slot, ring;  // of tiles; of the block of keys that comes next
  uint32_t q_parity = 0;
  float scale_log2;

  __device__ __forceinline__ bool speaks() const { return kAllLanesArrive || threadIdx.x % 32 == 0; }
  __device__ __forceinline__ void release(Barrier& empty) const {
    if (speaks()) empty.arrive();
  }
  // The block's keys and, behind the tile's last block, its queries.
  __device__ __forceinline__ void release_scores_operands(int block) const {
    release(storage.k_empty[ring.stage()]);
    if (block == 0) release(storage.q_empty);
  }
  // Row inside the tile of this thread's first accumulators.
  __device__ __forceinline__ int row() const {
    return warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }
};

using Scores = float[kScoreFragment];
using Out = float[kOutFragment];
using Weights = uint32_t[kTileKeys / 16][4];

__device__ __forceinline__ void start_scores(const PrefillConsumer& self, Scores& scores, int stage) {
  const uint64_t q = k_major_swizzle128_descriptor(&self.storage.q[0][self.warpgroup * 64 * kSlab]);
  const uint64_t k = k_major_swizzle128_descriptor(self.storage.k[stage][0]);
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kQueryDim / 16; ++step) {
    const int inside = step % 4 * 2, slab = step / 4;
    WgmmaBF16<kTileKeys, Major::kK>::multiply(scores, q + slab * (sizeof(QuerySlab) >> 4) + inside,
                                              k + slab * (sizeof(KeySlab) >> 4) + inside, step != 0);
  }
  wgmma_commit();
  pin_registers(scores);
}

__device__ __forceinline__ void start_out(const PrefillConsumer& self, Out& out, const Weights& weights, int stage) {
  const uint64_t v = mn_major_swizzle128_descriptor(self.storage.v[stage][0], sizeof(KeySlab));
  pin_registers(out);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    WgmmaBF16<kValueDim, Major::kMN>::multiply(out, weights[step], v + step * 128, true);
  }
  wgmma_commit();
  pin_registers(out);
}

__device__ __forceinline__ void pack_weights(Weights& weights, const Scores& scores) {
#pragma unroll
  for (int i = 0; i < kScoreFragment / 2; ++i) weights[i / 4][i % 4] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
}

template <bool kMask>
__device__ __forceinline__ void take_scores(const PrefillConsumer& self, const PrefillTile& tile, int block,
                                            SoftmaxState& state, Scores& scores) {
  if constexpr (kMask) {
    const int first_column = block * kTileKeys + threadIdx.x % 4 * 2, row = self.row();
    const int seen[2] = {min(tile.num_keys, tile.seen + row * self.params.causal) - first_column,
                         min(tile.num_keys, tile.seen + (row + 8) * self.params.causal) - first_column};
    mask_scores<kTileKeys>(scores, seen);
  }
  take_block<kTileKeys>(state, scores, self.scale_log2);
}

// Values past the end of a sequence are those of its neighbour. Their weights are zero, but zero times NaN is not.
__device__ __forceinline__ void clear_foreign_values(const PrefillConsumer& self, const PrefillTile& tile) {
  const int first = tile.num_keys - (tile.num_blocks - 1) * kTileKeys;
  if (first >= kTileKeys || tile.key + tile.num_keys >= self.params.num_keys) return;  // the engine pads with zeros
  self.storage.v_full[self.ring.stage()].wait(self.ring.full_parity());
  constexpr int kChunks = kSlab * 2 / 16;
#pragma unroll 1
  for (int chunk = first * kChunks + threadIdx.x - 128; chunk < kTileKeys * kChunks;
       chunk += 32 * kPrefillConsumerWarps) {
#pragma unroll
    for (KeySlab& slab : self.storage.v[self.ring.stage()])
      reinterpret_cast<uint4*>(slab)[chunk] = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  named_barrier_sync(kConsumerBarrier, 32 * kPrefillConsumerWarps);
}

// Scores of one block while the block before meets its values.
template <bool kMask>
__device__ __forceinline__ void advance_block(PrefillConsumer& self, const PrefillTile& tile, int block,
                                              SoftmaxState& state, Scores& scores, Weights& weights, Out& out) {
  const TwoStage behind = self.ring;
  ++self.ring.count;
  self.storage.k_full[self.ring.stage()].wait(self.ring.full_parity());
  start_scores(self, scores, self.ring.stage());
  scale_rows(out, state.rescale);
  self.storage.v_full[behind.stage()].wait(behind.full_parity());
  start_out(self, out, weights, behind.stage());
  wgmma_wait<1>();
  pin_registers(scores);
  self.release_scores_operands(block);
  take_scores<kMask>(self, tile, block, state, scores);
  pin_registers(scores);
  self.storage.v_full[behind.stage()].wait(behind.full_parity());
  wgmma_wait<0>();
  pin_registers(out);
  self.release(self.storage.v_empty[behind.stage()]);
  pack_weights(weights, scores);
}

__device__ __forceinline__ void attend_tile(PrefillConsumer& self, const PrefillTile& tile, SoftmaxState& state,
                                            Out& out) {
  PrefillStorage& storage = self.storage;
  Scores scores;
  Weights weights;
  int block = tile.num_blocks - 1;
  storage.q_full.wait(self.q_parity);
  storage.k_full[self.ring.stage()].wait(self.ring.full_parity());
  start_scores(self, scores, self.ring.stage());
  wgmma_wait<0>();
  pin_registers(scores);
  self.release_scores_operands(block);
  take_scores<true>(self, tile, block, state, scores);
  pack_weights(weights, scores);
  clear_foreign_values(self, tile);
  const int num_whole_blocks = tile.num_whole_blocks();
#pragma unroll 1
  for (--block; block >= num_whole_blocks; --block) {
    advance_block<true>(self, tile, block, state, scores, weights, out);
  }
#pragma unroll 1
  for (; block >= 0; --block) advance_block<false>(self, tile, block, state, scores, weights, out);
  self.q_parity ^= 1;

  scale_rows(out, state.rescale);
  storage.v_full[self.ring.stage()].wait(self.ring.full_parity());
  start_out(self, out, weights, self.ring.stage());
  wgmma_wait<0>();
  pin_registers(out);
  self.release(storage.v_empty[self.ring.stage()]);
  ++self.ring.count;
}

__device__ __forceinline__ void finish_tile(const PrefillConsumer& self, const PrefillTile& tile,
                                            const SoftmaxState& state, Out& out) {
  constexpr float kLn2 = 0.693147180559945309f;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_over_quad(state.sum[half]);
    factor[half] = sum == 0 ? 0 : 1 / sum;
    const int row = tile.query + self.row() + half * 8;
    if (threadIdx.x % 4 == 0 && row < tile.query_end) {
      const float log2_sum = offset_of(state.peak[half], self.scale_log2) + log2f(sum);
      self.params.lse[int64_t(row) * self.params.num_heads + tile.head] = log2_sum * kLn2;
    }
  }
  scale_rows(out, factor);
  const int64_t row_stride = int64_t(self.params.num_heads) * kValueDim;
  auto* target = static_cast<__nv_bfloat16*>(self.params.out) + tile.query * row_stride + tile.head * kValueDim;
  store_rows<kValueDim / 8>(target, row_stride, self.row(), tile.query_end - tile.query, out, 0, 1.0f);
}

__device__ __forceinline__ void consumer_attend_tiles(PrefillStorage& storage, const MlaPrefillParams& params) {
  constexpr float kLog2E = 1.44269504088896341f;
  PrefillConsumer self{storage, params, __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0)};
  self.scale_log2 = params.scale * kLog2E;
  while (true) {
    storage.tile_full[self.slot.stage()].wait(self.slot.full_parity());
    const PrefillTile tile = storage.tile[self.slot.stage()];
    __syncwarp();
    self.release(storage.tile_empty[self.slot.stage()]);
    ++self.slot.count;
    if (tile.num_blocks < 0) return;
    SoftmaxState state;
    Out out = {};
    if (tile.num_blocks > 0) attend_tile(self, tile, state, out);
    finish_tile(self, tile, state, out);
  }
}

__global__ void __launch_bounds__(kPrefillThreads, 1)
    sm90_mla_prefill_kernel(const __grid_constant__ PrefillMaps maps, const __grid_constant__ MlaPrefillParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<PrefillStorage*>(shared_bytes);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    storage.q_full.init(1);
    storage.q_empty.init(kPrefillConsumerWarps * kArrivalsOfAWarp);
    for (int stage = 0; stage < 2; ++stage) {
      storage.k_full[stage].init(1);
      storage.v_full[stage].init(1);
      storage.tile_full[stage].init(1);
      storage.k_empty[stage].init(kPrefillConsumerWarps * kArrivalsOfAWarp);
      storage.v_empty[stage].init(kPrefillConsumerWarps * kArrivalsOfAWarp);
      storage.tile_empty[stage].init(kPrefillConsumerWarps * kArrivalsOfAWarp);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    release_registers<40>();
    if (warp == 0) producer_load_tiles(storage, maps, params);
  } else {
    claim_registers<232>();
    consumer_attend_tiles(storage, params);
  }
}

}  // namespace dsv3rt
