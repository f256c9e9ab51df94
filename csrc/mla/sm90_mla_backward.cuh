// Latent attention, backward: one persistent block an SM of two warpgroups, each owning 64 keys. For every 64 queries,
// transposed scores and weights stay in registers, and are the register operand of the products that sum dv and dk over
// queries; only the scores' gradient passes through shared memory, for dq. dq is summed over blocks of keys in memory
// by vector reductions, in the order of accumulators, so that registers go out as they are.
#pragma once

#include "hopper/arithmetic.cuh"
#include "hopper/fragment.cuh"
#include "hopper/memory.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/backward_storage.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

struct BackwardMaps {
  CUtensorMap q, dout, k_nope, k_rope, v;
};

constexpr int kQuerySlabStride = sizeof(BackwardQuerySlab) >> 4, kKeySlabStride = sizeof(BackwardKeySlab) >> 4;
constexpr int kMNStep = 128;  // of a descriptor, 16 rows along k of an MN-major operand

using TransposedScores = float[kBackwardQueries / 2];  // (keys, queries): rows are keys
using TransposedWeights = uint32_t[kBackwardQueries / 16][4];  // packed, a register operand along queries

struct KeyGradients {
  float dk[kQueryDim / 2];
  float dv[kValueDim / 2];
};

// Positions in the rings of queries and of their gradients; `count` goes on through all tiles.
template <int kStages>
struct RingOf {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct BackwardRings {
  RingOf<kQueryStages> q;
  RingOf<kDoutStages> dout;
  uint32_t keys_parity = 0;
  int buffer = 0;  // of dscores
};

__device__ __forceinline__ void load_queries(BackwardStorage& storage, const BackwardMaps& maps,
                                             const MlaBackwardParams& params, int block, int stage) {
  const BackwardTile& tile = storage.tile;
  Barrier& full = storage.q_full[stage];
  full.arrive_and_expect(sizeof(storage.q[0]) + sizeof(QueryStatistics));
  tma_load_4d(storage.q[stage][0], maps.q, full, 0, tile.query + block * kBackwardQueries, 0, tile.head);
  const int64_t row = int64_t(tile.head) * params.num_tiles + tile.query_tile + block;
  bulk_load(&storage.statistics[stage], params.statistics + row * (sizeof(QueryStatistics) / 4),
            sizeof(QueryStatistics), full);
}

__device__ __forceinline__ void load_dout(BackwardStorage& storage, const BackwardMaps& maps, int block, int stage) {
  const BackwardTile& tile = storage.tile;
  Barrier& full = storage.dout_full[stage];
  full.arrive_and_expect(sizeof(storage.dout[0]));
  tma_load_4d(storage.dout[stage][0], maps.dout, full, 0, tile.query + block * kBackwardQueries, 0, tile.head);
}

__device__ __forceinline__ void load_keys(BackwardStorage& storage, const BackwardMaps& maps) {
  const BackwardTile& tile = storage.tile;
  Barrier& full = storage.keys_full;
  full.arrive_and_expect(sizeof(storage.k) + sizeof(storage.v));
  tma_load_4d(storage.k[0], maps.k_nope, full, 0, tile.key, 0, tile.head);
  tma_load_4d(storage.k[kNopeDim / kBackwardSlab], maps.k_rope, full, 0, tile.key, 0, 0);
  tma_load_4d(storage.v[0], maps.v, full, 0, tile.key, 0, tile.head);
}

// Rows from `first` on belong to another sequence: zeros instead, because zero times NaN is NaN.
template <int kSlabs, int kElements>
__device__ __forceinline__ void clear_rows(__nv_bfloat16 (&slabs)[kSlabs][kElements], int first) {
  constexpr int kChunks = kBackwardSlab * 2 / 16;
#pragma unroll 1
  for (int chunk = first * kChunks + threadIdx.x; chunk < kElements / 8; chunk += kBackwardThreads) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) reinterpret_cast<uint4*>(slabs[slab])[chunk] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void start_scores(TransposedScores& scores, uint64_t keys, uint64_t queries, int slabs) {
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < slabs * 4; ++step) {
    WgmmaBF16<kBackwardQueries, Major::kK>::multiply(scores, keys + step / 4 * kKeySlabStride + step % 4 * 2,
                                                     queries + step / 4 * kQuerySlabStride + step % 4 * 2, step != 0);
  }
  wgmma_commit();
  pin_registers(scores);
}

// gradient (keys, columns) += weights (keys, queries) times an operand that lies as (queries, columns).
template <int kColumns>
__device__ __forceinline__ void start_key_gradient(float (&gradient)[kColumns / 2], const TransposedWeights& weights,
                                                   const __nv_bfloat16* operand) {
  const uint64_t descriptor = mn_major_swizzle128_descriptor(operand, sizeof(BackwardQuerySlab));
  pin_registers(gradient);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBackwardQueries / 16; ++step) {
    WgmmaBF16<kColumns, Major::kMN>::multiply(gradient, weights[step], descriptor + step * kMNStep, true);
  }
  wgmma_commit();
  pin_registers(gradient);
}

__device__ __forceinline__ void start_query_gradient(const BackwardStorage& storage, QueryGradient& dq,
                                                     const __nv_bfloat16* dscores, int warpgroup) {
  const uint64_t a = mn_major_swizzle128_descriptor(dscores, 0);
  const uint64_t nope = mn_major_swizzle128_descriptor(storage.k[warpgroup], sizeof(BackwardKeySlab));
  const uint64_t rope = mn_major_swizzle128_descriptor(storage.k[2] + warpgroup * 32, sizeof(BackwardKeySlab));
  pin_registers(dq.nope);
  pin_registers(dq.rope);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBackwardKeys / 16; ++step) {
    WgmmaBF16<64, Major::kMN, Major::kMN>::multiply(dq.nope, a + step * kMNStep, nope + step * kMNStep, step != 0);
    WgmmaBF16<32, Major::kMN, Major::kMN>::multiply(dq.rope, a + step * kMNStep, rope + step * kMNStep, step != 0);
  }
  wgmma_commit();
  pin_registers(dq.nope);
  pin_registers(dq.rope);
}

// Weights exp2(scale * score - lse) of a column's query; hidden ones are zero. `hidden_from[row]`: columns of this
// thread, counted from its first, up to and including which the row's key is hidden.
template <bool kMask>
__device__ __forceinline__ void take_weights(TransposedWeights& weights, TransposedScores& scores,
                                             const QueryStatistics& statistics, float scale_log2,
                                             const int (&hidden_to)[2]) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
    const float2 lse = *reinterpret_cast<const float2*>(&statistics.lse_log2[octet * 8 + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[octet * 4 + i];
      score = exp2_approx(fmaf(score, scale_log2, -(i % 2 ? lse.y : lse.x)));
      if (kMask && octet * 8 + i % 2 <= hidden_to[i / 2]) score = 0;
    }
    weights[octet / 2][octet % 2 * 2] = pack_bf16(scores[octet * 4], scores[octet * 4 + 1]);
    weights[octet / 2][octet % 2 * 2 + 1] = pack_bf16(scores[octet * 4 + 2], scores[octet * 4 + 3]);
  }
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

// Gradient of the scaled scores, without the scale: weight * (dweight - delta).
__device__ __forceinline__ void take_dscores(TransposedWeights& dscores, const TransposedWeights& weights,
                                             const TransposedScores& dweights, const QueryStatistics& statistics) {
#pragma unroll
  for (int octet = 0; octet < kBackwardQueries / 8; ++octet) {
    const float2 delta = *reinterpret_cast<const float2*>(&statistics.delta[octet * 8 + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float2 weight = unpack_bf16(weights[octet / 2][octet % 2 * 2 + row]);
      dscores[octet / 2][octet % 2 * 2 + row] = pack_bf16(weight.x * (dweights[octet * 4 + row * 2] - delta.x),
                                                          weight.y * (dweights[octet * 4 + row * 2 + 1] - delta.y));
    }
  }
}

// Into rows of 128 bytes, a row a key, swizzled as the copy engine would.
__device__ __forceinline__ void store_dscores(__nv_bfloat16* target, const TransposedWeights& dscores) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane % 16;
  const uint32_t line = smem_address(target) + row * 128;
#pragma unroll
  for (int step = 0; step < kBackwardQueries / 16; ++step) {
    const int chunk = (step * 2 + lane / 16) ^ (row % 8);
    store_matrices(line + chunk * 16, dscores[step]);
  }
}

__device__ __forceinline__ void add_query_gradient(float* target, const QueryGradient& dq) {
#pragma unroll
  for (int i = 0; i < kNopeDim / 4; i += 4) {
    add_to_global(target + i / 4 * kQuerySumStride, dq.nope[i], dq.nope[i + 1], dq.nope[i + 2], dq.nope[i + 3]);
  }
  target += kNopeDim / 16 * kQuerySumStride;
#pragma unroll
  for (int i = 0; i < kRopeDim / 4; i += 4) {
    add_to_global(target + i / 4 * kQuerySumStride, dq.rope[i], dq.rope[i + 1], dq.rope[i + 2], dq.rope[i + 3]);
  }
}

template <bool kMask>
__device__ __forceinline__ void advance_queries(BackwardStorage& storage, const BackwardMaps& maps,
                                                const MlaBackwardParams& params, BackwardRings& rings, int block,
                                                KeyGradients& sums) {
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 128), 0);
  const BackwardTile& tile = storage.tile;
  const int q_stage = rings.q.stage, dout_stage = rings.dout.stage;
  storage.q_full[q_stage].wait(rings.q.parity);
  storage.dout_full[dout_stage].wait(rings.dout.parity);
  if (const int left = tile.num_queries - block * kBackwardQueries;
      left < kBackwardQueries && tile.query + tile.num_queries < params.num_queries) {
    clear_rows(storage.q[q_stage], left);
    clear_rows(storage.dout[dout_stage], left);
    fence_async_proxy();
    __syncthreads();
  }

  TransposedScores scores, dweights;
  start_scores(scores, k_major_swizzle128_descriptor(storage.k[0] + warpgroup * 64 * kBackwardSlab),
               k_major_swizzle128_descriptor(storage.q[q_stage][0]), kQueryDim / kBackwardSlab);
  start_scores(dweights, k_major_swizzle128_descriptor(storage.v[0] + warpgroup * 64 * kBackwardSlab),
               k_major_swizzle128_descriptor(storage.dout[dout_stage][0]), kValueDim / kBackwardSlab);
  wgmma_wait<1>();
  pin_registers(scores);
  int hidden_to[2];
  if constexpr (kMask) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i * 8;
      const int first = threadIdx.x % 4 * 2;
      // Query `column` of the block sees the key when key < seen + slope * (first query of the block + column).
      const int hidden = tile.slope ? key - tile.seen - block * kBackwardQueries : key < tile.seen ? -1 : 1 << 20;
      hidden_to[i] = key < tile.num_keys ? hidden - first : 1 << 20;
    }
  }
  TransposedWeights weights, dscores;
  take_weights<kMask>(weights, scores, storage.statistics[q_stage], params.scale * 1.44269504088896341f, hidden_to);
  start_key_gradient<kValueDim>(sums.dv, weights, storage.dout[dout_stage][0]);
  wgmma_wait<1>();
  pin_registers(dweights);
  take_dscores(dscores, weights, dweights, storage.statistics[q_stage]);
  store_dscores(storage.dscores[rings.buffer], dscores);
  fence_async_proxy();
  start_key_gradient<kQueryDim>(sums.dk, dscores, storage.q[q_stage][0]);
  __syncthreads();  // all of dscores is there, and nobody reads what the block before loaded
  if (threadIdx.x == 0) {
    if (block + 2 < tile.end_block) load_queries(storage, maps, params, block + 2, (q_stage + 2) % kQueryStages);
    if (block + 1 < tile.end_block) load_dout(storage, maps, block + 1, dout_stage ^ 1);
  }
  wgmma_wait<1>();  // dv: its operand's registers are free
  QueryGradient dq;
  start_query_gradient(storage, dq, storage.dscores[rings.buffer], warpgroup);
  wgmma_wait<0>();
  pin_registers(dq.nope);
  pin_registers(dq.rope);
  pin_registers(sums.dk);
  pin_registers(sums.dv);
  const int64_t row = int64_t(tile.head) * params.num_tiles + tile.query_tile + block;
  add_query_gradient(params.dq_sum + row * kQuerySumFloats + query_sum_offset(), dq);
  rings.q.advance();
  rings.dout.advance();
  rings.buffer ^= 1;
}

__device__ __forceinline__ void finish_keys(const BackwardTile& tile, const MlaBackwardParams& params,
                                            const KeyGradients& sums) {
  const int64_t offset = tile.key * params.dkv_row_stride + tile.head * params.dkv_head_stride;
  auto* dk = static_cast<__nv_bfloat16*>(params.dk_nope) + offset;
  auto* dv = static_cast<__nv_bfloat16*>(params.dv) + offset;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  store_rows<kNopeDim / 8>(dk, params.dkv_row_stride, row, tile.num_keys, sums.dk, 0, params.scale);
  store_rows<kValueDim / 8>(dv, params.dkv_row_stride, row, tile.num_keys, sums.dv, 0, 1.0f);
  float* dk_rope = params.dk_rope_sum + int64_t(tile.key + row) * kRopeDim + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = kNopeDim / 2; i < kQueryDim / 2; i += 4) {
    float* target = dk_rope + (i / 4 - kNopeDim / 8) * 8;
    if (row < tile.num_keys) add_to_global(target, sums.dk[i], sums.dk[i + 1]);
    if (row + 8 < tile.num_keys) add_to_global(target + 8 * kRopeDim, sums.dk[i + 2], sums.dk[i + 3]);
  }
}

__device__ __forceinline__ void fetch_tile(BackwardStorage& storage, const MlaBackwardParams& params) {
  TileCursor cursor(params.k_ends, params.num_sequences, kBackwardKeys, params.num_heads, storage.window,
                    storage.window_begin);
  const BackwardTile tile = place_backward_tile(params, cursor.find(storage.next_tile));
  __syncwarp();
  if (threadIdx.x == 0) {
    storage.tile = tile;
    storage.window = cursor.window();
    storage.window_begin = cursor.window_begin();
    auto* counter = reinterpret_cast<int32_t*>(params.dk_rope_sum + int64_t(params.num_keys) * kRopeDim);
    storage.next_tile = gridDim.x + atomicAdd(counter, 1);
  }
}

__device__ __forceinline__ void differentiate_tile(BackwardStorage& storage, const BackwardMaps& maps,
                                                   const MlaBackwardParams& params, BackwardRings& rings) {
  const int first_block = storage.tile.first_block;
  if (threadIdx.x == 0 && first_block < storage.tile.end_block) {
    load_keys(storage, maps);
    load_queries(storage, maps, params, first_block, rings.q.stage);
    load_dout(storage, maps, first_block, rings.dout.stage);
    if (first_block + 1 < storage.tile.end_block) {
      load_queries(storage, maps, params, first_block + 1, (rings.q.stage + 1) % kQueryStages);
    }
  }
  KeyGradients sums = {};
  if (first_block < storage.tile.end_block) {
    storage.keys_full.wait(rings.keys_parity);
    rings.keys_parity ^= 1;
    if (storage.tile.num_keys < kBackwardKeys && storage.tile.key + storage.tile.num_keys < params.num_keys) {
      clear_rows(storage.k, storage.tile.num_keys);
      clear_rows(storage.v, storage.tile.num_keys);
      fence_async_proxy();
      __syncthreads();
    }
    int block = first_block;
#pragma unroll 1
    for (; block < first_block + storage.tile.num_masked; ++block) {
      advance_queries<true>(storage, maps, params, rings, block, sums);
    }
#pragma unroll 1
    for (; block < storage.tile.end_block; ++block) {
      advance_queries<false>(storage, maps, params, rings, block, sums);
    }
  }
  finish_keys(storage.tile, params, sums);
}

__global__ void __launch_bounds__(kBackwardThreads, 1)
    sm90_mla_backward_kernel(const __grid_constant__ BackwardMaps maps,
                             const __grid_constant__ MlaBackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<BackwardStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    storage.keys_full.init(1);
    for (Barrier& barrier : storage.q_full) barrier.init(1);
    for (Barrier& barrier : storage.dout_full) barrier.init(1);
    fence_barrier_init();
    storage.next_tile = blockIdx.x;
    storage.window = 0;
    storage.window_begin = 0;
  }
  BackwardRings rings;
  while (true) {
    __syncthreads();  // nobody reads the tile before, or its keys
    if (threadIdx.x < 32) fetch_tile(storage, params);
    __syncthreads();
    if (storage.tile.head < 0) return;
    differentiate_tile(storage, maps, params, rings);
  }
}

}  // namespace dsv3rt
