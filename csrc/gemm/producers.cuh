// The warps that feed the ring: operands and row scales by the copy engine, 128x128 scales by ordinary loads.
#pragma once

#include "gemm/scheduler.cuh"
#include "hopper/tma.cuh"

namespace dsv3rt {

struct GemmMaps {
  CUtensorMap a, b, scale_a, scale_b, d;
};

template <typename C>
__device__ __forceinline__ void load_b(uint8_t* target, const GemmMaps& maps, Barrier& full, int depth, int row,
                                       uint32_t cta_rank) {
  constexpr int kHalf = C::kBlockN / 2;
  if constexpr (C::kShare == Share::kB) {
    target += cta_rank * kHalf * kBlockK;
    row += cta_rank * kHalf;
  }
  if constexpr (C::kPairedRows && C::kShare == Share::kB) {
    tma_load_5d_multicast(target, maps.b, full, depth, row / kPairedRowGroup, 3);
  } else if constexpr (C::kPairedRows) {
    tma_load_5d(target, maps.b, full, depth, row / kPairedRowGroup);
  } else if constexpr (C::kShare == Share::kB) {
    tma_load_2d_multicast(target, maps.b, full, depth, row, 3);
  } else {
    tma_load_2d(target, maps.b, full, depth, row);
  }
}

template <typename C>
__device__ __forceinline__ void load_stage(GemmStorage<C>& storage, const GemmMaps& maps, const Tile& tile, int k_block,
                                           const GemmRing<C>& ring, uint32_t cta_rank) {
  const int stage = ring.stage, slot = ring.scale_slot();
  Barrier& full = storage.full[stage];
  full.arrive_and_expect(C::kStageBytes);
  const int depth = (tile.k_block_begin + k_block) * kBlockK;
  if constexpr (C::kShare == Share::kA) {
    constexpr int kHalf = C::kBlockM / 2;
    tma_load_2d_multicast(&storage.a[stage][cta_rank * kHalf * kBlockK], maps.a, full, depth, tile.m + cta_rank * kHalf,
                          3);
  } else {
    tma_load_2d(storage.a[stage], maps.a, full, depth, tile.m);
  }
  load_b<C>(storage.b[stage], maps, full, depth, tile.b_row, cta_rank);
  tma_load_2d(storage.scale_a[slot], maps.scale_a, full, tile.m, tile.k_block_begin + k_block);
  if constexpr (C::kScaleB == ScaleB::kRow) {
    tma_load_2d(storage.scale_b[slot], maps.scale_b, full, tile.n, tile.k_block_begin + k_block);
  }
}

template <typename C>
__device__ __forceinline__ void producer_load_tiles(GemmStorage<C>& storage, const GemmMaps& maps,
                                                    TileScheduler<C> scheduler) {
  const uint32_t cta_rank = C::kShare == Share::kNone ? 0 : cluster_cta_rank();
  GemmRing<C> ring;
  Tile tile;
  while (scheduler.next(tile)) {
#pragma unroll 1  // a producer has few registers
    for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block, ring.advance()) {
      storage.empty[ring.stage].wait(ring.parity ^ 1);
      load_stage<C>(storage, maps, tile, k_block, ring, cta_rank);
    }
  }
}

// Scales of B in 128x128 blocks, of which a tile touches at most two. A warp of its own reads 32
// K-blocks at a time and hands each on through its stage: consumers never wait for global memory.
template <typename C>
__device__ __forceinline__ void producer_load_block_scales(GemmStorage<C>& storage, const GemmParams& params,
                                                           TileScheduler<C> scheduler) {
  const int lane = threadIdx.x % 32;
  const int k_blocks = ceil_div(params.k, kBlockK), n_blocks = ceil_div(params.n, 128);
  RingPosition<C::kStages> ring;
  Tile tile;
  float scales[C::kBlockScales];
  while (scheduler.next(tile)) {
    const int first = tile.n / 128;
    const float* source = params.scale_b + (int64_t(tile.group) * n_blocks + first) * k_blocks;
#pragma unroll 1
    for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block, ring.advance()) {
      if (k_block % 32 == 0) {
#pragma unroll
        for (int i = 0; i < C::kBlockScales; ++i) {
          const bool exists = first + i < n_blocks && k_block + lane < tile.num_k_blocks;
          scales[i] = exists ? __ldg(source + int64_t(i) * k_blocks + tile.k_block_begin + k_block + lane) : 0;
        }
      }
      storage.empty[ring.stage].wait(ring.parity ^ 1);
      if (lane == k_block % 32) {
#pragma unroll
        for (int i = 0; i < C::kBlockScales; ++i) storage.scale_b[ring.stage][i] = scales[i];
        storage.full[ring.stage].arrive();
      }
    }
  }
}

}  // namespace dsv3rt
