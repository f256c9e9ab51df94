// FP8 block-scaled GEMM. One persistent block an SM: warps of the first warpgroup feed a ring of stages and take
// finished tiles away through the copy engine, two or three consumer warpgroups multiply and promote.
#pragma once

#include "gemm/consumers.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/producers.cuh"

namespace dsv3rt {

template <typename C>
__device__ __forceinline__ void init_barriers(GemmStorage<C>& storage) {
  for (int stage = 0; stage < C::kStages; ++stage) {
    storage.full[stage].init(C::kScaleB == ScaleB::kBlock128 ? 2 : 1);
    storage.empty[stage].init(4 * C::kConsumers * kArrivalsOfAWarp * (C::kMulticast ? 2 : 1));
  }
  fence_barrier_init();
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    sm90_fp8_gemm_kernel(const __grid_constant__ GemmMaps maps, const __grid_constant__ GemmParams params,
                         const __grid_constant__ TileRaster raster) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<GemmStorage<C>*>(shared_bytes);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    prefetch_map(maps.a);
    prefetch_map(maps.b);
    prefetch_map(maps.scale_a);
    init_barriers<C>(storage);
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
  const TileScheduler<C> scheduler(params, raster, storage.block_prefix);
  // Registers of the SM: 65536 for 384 or 512 threads.
  constexpr int kProducerRegisters = C::kConsumers == 2 ? 40 : 32, kConsumerRegisters = C::kConsumers == 2 ? 232 : 160;
  if (warp < 4) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x == 0) producer_load_tiles<C>(storage, maps, scheduler);
    if (C::kScaleB == ScaleB::kBlock128 && warp == 1) producer_load_block_scales<C>(storage, params, scheduler);
    if constexpr (C::kShare == Share::kDepth) {  // as gather_halves
      __syncwarp();
      cluster_sync();
      cluster_sync();
    }
    const bool stores = C::kShare != Share::kDepth || cluster_cta_rank() == 0;
    if constexpr (C::kParts == 1) {
      if (warp == 2 && stores) storer_empty_tiles<C>(storage, maps, scheduler);
    } else {
      if (warp >= 1 && warp <= C::kConsumers) storer_empty_parts<C>(storage, maps, scheduler, warp - 1);
    }
  } else {
    claim_registers<kConsumerRegisters>();
    consumer_multiply_tiles<C>(storage, scheduler);
  }
  if constexpr (C::kShare != Share::kNone) cluster_sync();  // the peer may still write here
}

}  // namespace dsv3rt
