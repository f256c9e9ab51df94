// Latent attention over a paged cache. A block has 64 rows, queries x heads of one request at a time. One warpgroup
// loads pages, of BF16 through the copy engine, of FP8 through registers. One turns scores into weights; two others
// keep 256 columns of the output each. The tensor cores multiply weights of one page with its values while the scores
// of the next are computed.
#pragma once

#include "mla/decode_load.cuh"
#include "mla/decode_output.cuh"
#include "mla/decode_scores.cuh"
#include "mla/decode_storage.cuh"
#include "mla/decode_widen.cuh"

namespace dsv3rt {

// Where pages come from. Arrivals that fill a chunk of latents and a rope slab, readers of pieces among the loading
// warps, and registers a thread of loading, scores and output.
struct Bf16Cache {
  using Storage = Bf16Storage;
  static constexpr int kLatentArrivals = 1, kRopeArrivals = 1, kPieceReaders = 1;
  static constexpr int kLoadRegisters = 24, kScoreRegisters = 168, kOutRegisters = 160;

  __device__ __forceinline__ static void load(Storage& storage, const DecodeMaps& maps, const MlaDecodeParams& params,
                                              int warp) {
    if (threadIdx.x == 0) producer_load_pieces(storage, maps, params);
    if (warp == 1) producer_find_pieces(storage, params);
  }
};

struct Fp8Cache {
  using Storage = WidenedStorage;
  static constexpr int kLatentArrivals = kWidenWarps * kArrivalsOfAWarp;
  static constexpr int kRopeArrivals = kWidenWarps * kArrivalsOfAWarp, kPieceReaders = 0;
  static constexpr int kLoadRegisters = 80, kScoreRegisters = 112, kOutRegisters = 160;

  __device__ __forceinline__ static void load(Storage& storage, const DecodeMaps& maps, const MlaDecodeParams& params,
                                              int warp) {
    producer_widen_pieces(storage, maps.q, params, warp);
  }
};

template <class Cache>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    sm90_mla_decode_kernel(const __grid_constant__ DecodeMaps maps, const __grid_constant__ MlaDecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<typename Cache::Storage*>(shared_bytes);
  let_next_grid_start();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kPageStages; ++stage) {
      for (Barrier& full : storage.latent_full[stage]) full.init(Cache::kLatentArrivals);
      storage.page_empty[stage].init(kOutWarps * kArrivalsOfAWarp);
      storage.weights_full[stage].init(kScoreArrivals);
    }
    for (Barrier& full : storage.rope_full) full.init(Cache::kRopeArrivals);
    storage.inverse_full.init(kScoreArrivals);
    storage.inverse_empty.init(32 * kOutWarps);
    for (int slot = 0; slot < kTileSlots; ++slot) {
      storage.piece_full[slot].init(1);
      storage.piece_empty[slot].init(Cache::kPieceReaders + 128 + 32 * kOutWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    set_registers<kDecodeRegisters, Cache::kLoadRegisters>();
    Cache::load(storage, maps, params, warp);
  } else if (warp < 8) {
    set_registers<kDecodeRegisters, Cache::kScoreRegisters>();
    consumer_score_pieces(storage, params);
  } else {
    set_registers<kDecodeRegisters, Cache::kOutRegisters>();
    consumer_add_pieces(storage, params, warp / 12);
  }
}

}  // namespace dsv3rt
