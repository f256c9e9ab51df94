// FP8 block-scaled GEMM. One persistent block an SM: a producer warp feeds a ring of stages through the copy engine,
// two consumer warpgroups multiply and promote. Each warpgroup owns half of the block's rows in waves of 64. The tensor
// cores accumulate 128 deep, then the CUDA cores add scale_a * scale_b * partial in FP32 while the other warpgroup
// multiplies.
#pragma once

#include "gemm/config.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/scheduler.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_fp8.cuh"

namespace dsv3rt {

struct GemmMaps {
  CUtensorMap a, b, scale_a, scale_b;
};

// Position in the ring; the parity flips at every wrap.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename C>
__device__ __forceinline__ void load_stage(GemmStorage<C>& storage, const GemmMaps& maps, const Tile& tile, int k_block,
                                           int stage, uint32_t cta_rank) {
  Barrier& full = storage.full[stage];
  full.arrive_and_expect(C::kStageBytes);
  const int depth = (tile.k_block_begin + k_block) * kBlockK;
  const int b_row = tile.b_row;
  if constexpr (C::kShare == Share::kA) {
    constexpr int kHalf = C::kBlockM / 2;
    tma_load_2d_multicast(&storage.a[stage][cta_rank * kHalf * kBlockK], maps.a, full, depth, tile.m + cta_rank * kHalf,
                          3);
    tma_load_2d(storage.b[stage], maps.b, full, depth, b_row);
  } else if constexpr (C::kShare == Share::kB) {
    constexpr int kHalf = C::kBlockN / 2;
    tma_load_2d(storage.a[stage], maps.a, full, depth, tile.m);
    tma_load_2d_multicast(&storage.b[stage][cta_rank * kHalf * kBlockK], maps.b, full, depth, b_row + cta_rank * kHalf,
                          3);
  } else {
    tma_load_2d(storage.a[stage], maps.a, full, depth, tile.m);
    tma_load_2d(storage.b[stage], maps.b, full, depth, b_row);
  }
  tma_load_2d(storage.scale_a[stage], maps.scale_a, full, tile.m, tile.k_block_begin + k_block);
  if constexpr (C::kScaleB == ScaleB::kRow) {
    tma_load_2d(storage.scale_b[stage], maps.scale_b, full, tile.n, tile.k_block_begin + k_block);
  }
}

template <typename C>
__device__ __forceinline__ void producer_load_tiles(GemmStorage<C>& storage, const GemmMaps& maps,
                                                    TileScheduler<C>& scheduler) {
  const uint32_t cta_rank = C::kShare == Share::kNone ? 0 : cluster_cta_rank();
  RingPosition<C::kStages> ring;
  Tile tile;
  while (scheduler.next(tile)) {
#pragma unroll 1  // a producer has few registers
    for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block, ring.advance()) {
      storage.empty[ring.stage].wait(ring.parity ^ 1);
      load_stage<C>(storage, maps, tile, k_block, ring.stage, cta_rank);
    }
  }
}

// Scales of B in 128x128 blocks, of which a tile touches at most two. A warp of its own reads 32
// K-blocks at a time and hands each on through its stage: consumers never wait for global memory.
template <typename C>
__device__ __forceinline__ void producer_load_block_scales(GemmStorage<C>& storage, const GemmParams& params,
                                                           TileScheduler<C>& scheduler) {
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
          scales[i] = exists ? __ldg(source + int64_t(i) * k_blocks + k_block + lane) : 0;
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

// One body for each place where a tile can cross into the next block: no selection inside.
template <typename C, int kFirstColumns = gcd(C::kBlockN, 128)>
__device__ __forceinline__ void promote_block(float (&sum)[C::kFragment], const float (&partial)[C::kFragment],
                                              const float2 scale_a, const float (&scale_b)[C::kBlockScales],
                                              int first_columns) {
  if constexpr (kFirstColumns < 128) {
    if (first_columns != kFirstColumns) {
      return promote_block<C, kFirstColumns + gcd(C::kBlockN, 128)>(sum, partial, scale_a, scale_b, first_columns);
    }
  }
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
    const int block = octet * 8 < kFirstColumns ? 0 : 1;
    const float row0 = scale_a.x * scale_b[block], row8 = scale_a.y * scale_b[block];
    sum[octet * 4 + 0] += row0 * partial[octet * 4 + 0];
    sum[octet * 4 + 1] += row0 * partial[octet * 4 + 1];
    sum[octet * 4 + 2] += row8 * partial[octet * 4 + 2];
    sum[octet * 4 + 3] += row8 * partial[octet * 4 + 3];
  }
}

template <typename C>
__device__ __forceinline__ void promote_row(float (&sum)[C::kFragment], const float (&partial)[C::kFragment],
                                            const float2 scale_a, const float* scale_b) {
  const int pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
    const float2 factor = *reinterpret_cast<const float2*>(scale_b + octet * 8 + pair);
    sum[octet * 4 + 0] += scale_a.x * factor.x * partial[octet * 4 + 0];
    sum[octet * 4 + 1] += scale_a.x * factor.y * partial[octet * 4 + 1];
    sum[octet * 4 + 2] += scale_a.y * factor.x * partial[octet * 4 + 2];
    sum[octet * 4 + 3] += scale_a.y * factor.y * partial[octet * 4 + 3];
  }
}

// Frees a stage for the producers that write it: the own one and, where an operand is shared, the peer's.
template <typename C>
__device__ __forceinline__ void release_stage(GemmStorage<C>& storage, int stage) {
  const int lane = threadIdx.x % 32;
  if constexpr (C::kShare == Share::kNone) {
    if (lane == 0) storage.empty[stage].arrive();
  } else {
    if (lane < 2) storage.empty[stage].arrive_at(lane);
  }
}

template <typename C>
__device__ __forceinline__ void multiply_wave(float (&partial)[C::kFragment], uint64_t descriptor_a,
                                              uint64_t descriptor_b) {
  pin_registers(partial);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBlockK / 32; ++step) {
    WgmmaE4M3<C::kBlockN>::multiply(partial, descriptor_a + step * 2, descriptor_b + step * 2, step != 0);
  }
  wgmma_commit();
  pin_registers(partial);
}

template <typename C>
__device__ __forceinline__ void consume_tile(GemmStorage<C>& storage, const Tile& tile, RingPosition<C::kStages>& ring,
                                             float (&sum)[C::kWaves][C::kFragment]) {
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const int first_columns = __shfl_sync(~0u, 128 - tile.n % 128, 0);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
#pragma unroll
    for (int i = 0; i < C::kFragment; ++i) sum[wave][i] = 0;
  }
  for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block, ring.advance()) {
    storage.full[ring.stage].wait(ring.parity);
    const uint64_t descriptor_b = k_major_swizzle128_descriptor(storage.b[ring.stage]);
#pragma unroll
    for (int wave = 0; wave < C::kWaves; ++wave) {
      const int wave_row = (warpgroup * C::kWaves + wave) * 64;
      float partial[C::kFragment];
      multiply_wave<C>(partial, k_major_swizzle128_descriptor(&storage.a[ring.stage][wave_row * kBlockK]),
                       descriptor_b);
      const float* scales = &storage.scale_a[ring.stage][wave_row + row];
      const float2 scale_a = make_float2(scales[0], scales[8]);
      float scale_b[C::kBlockScales];
#pragma unroll
      for (int i = 0; i < C::kBlockScales; ++i) scale_b[i] = storage.scale_b[ring.stage][i];
      wgmma_wait<0>();
      pin_registers(partial);
      if constexpr (C::kScaleB == ScaleB::kBlock128) {
        if (wave == C::kWaves - 1) release_stage<C>(storage, ring.stage);
        promote_block<C>(sum[wave], partial, scale_a, scale_b, first_columns);
      } else {
        promote_row<C>(sum[wave], partial, scale_a, storage.scale_b[ring.stage]);
        if (wave == C::kWaves - 1) release_stage<C>(storage, ring.stage);
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void consumer_multiply_tiles(GemmStorage<C>& storage, const GemmParams& params,
                                                        TileScheduler<C>& scheduler) {
  RingPosition<C::kStages> ring;
  Tile tile;
  while (scheduler.next(tile)) {
    float sum[C::kWaves][C::kFragment];
    consume_tile<C>(storage, tile, ring, sum);
#pragma unroll
    for (int wave = 0; wave < C::kWaves; ++wave) store_wave<C>(params, tile, wave, sum[wave]);
  }
}

template <typename C>
__global__ void __launch_bounds__(kGemmThreads, 1)
    sm90_fp8_gemm_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ GemmParams params,
                         const __grid_constant__ TileRaster raster) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<GemmStorage<C>*>(shared_bytes);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp == 0 && threadIdx.x == 0) {
    prefetch_map(maps.a);
    prefetch_map(maps.b);
    prefetch_map(maps.scale_a);
    for (int stage = 0; stage < C::kStages; ++stage) {
      storage.full[stage].init(C::kScaleB == ScaleB::kBlock128 ? 2 : 1);
      storage.empty[stage].init(kConsumerWarps * C::kClusterSize);
    }
    fence_barrier_init();
  }
  wait_for_prior_grid();
  if constexpr (C::kGrouping == Grouping::kRows) {
    if (warp == 1) scan_group_blocks<C>(params, storage.block_prefix);
  }
  if constexpr (C::kShare == Share::kNone) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  TileScheduler<C> scheduler(params, raster, storage.block_prefix);
  if (warp < 4) {
    release_registers<40>();
    if (warp == 0 && threadIdx.x == 0) producer_load_tiles<C>(storage, maps, scheduler);
    if (C::kScaleB == ScaleB::kBlock128 && warp == 1) producer_load_block_scales<C>(storage, params, scheduler);
  } else {
    claim_registers<232>();
    consumer_multiply_tiles<C>(storage, params, scheduler);
  }
  if constexpr (C::kShare != Share::kNone) cluster_sync();  // the peer may still write here
}

}  // namespace dsv3rt
