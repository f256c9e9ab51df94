// What the two kernels of the backward pass share: shared memory and its barriers, laid out as in the forward pass, and
// how a producer fills a stage.
#pragma once

#include <cuda_bf16.h>

#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "mla/key_tiles.cuh"
#include "mla/query_tiles.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kBackwardConsumerWarps = 8;  // two warpgroups, of 64 rows each
constexpr int kBackwardThreads = 128 + 32 * kBackwardConsumerWarps;
constexpr int kBackwardStages = 3;
constexpr int kGradientBlockKeys = 64;  // that queries meet at a time

using Slab128 = __nv_bfloat16[128 * kSlab];  // 128 rows
using Slab64 = __nv_bfloat16[64 * kSlab];
using GradientTile = QueryTile<kGradientBlockKeys>;

// Of a tile of queries, as the preparing kernel writes it.
struct QueryStatistics {
  float lse_log2[kBackwardQueries];
  float delta[kBackwardQueries];
};

template <class Tile>
struct BackwardBarriers {
  Barrier tile_full[kTileSlots], tile_empty[kTileSlots];
  Barrier operands_full, operands_empty;  // of what stays for a tile
  Barrier full[kBackwardStages], empty[kBackwardStages];
  Barrier arrived;  // what the producer has to mend before it hands it on
  Tile tile[kTileSlots];

  __device__ __forceinline__ void init() {
    operands_full.init(1);
    operands_empty.init(kBackwardConsumerWarps);
    arrived.init(1);
    for (int stage = 0; stage < kBackwardStages; ++stage) {
      full[stage].init(1);
      empty[stage].init(kBackwardConsumerWarps);
    }
    for (int slot = 0; slot < kTileSlots; ++slot) {
      tile_full[slot].init(1);
      tile_empty[slot].init(kBackwardConsumerWarps + 1);  // and the warp that loads
    }
    fence_barrier_init();
  }
};

// Gradients of keys: 128 keys stay, queries pass.
struct KeyGradientStorage {
  alignas(1024) Slab128 k[kQueryDim / kSlab];
  alignas(1024) Slab128 v[kValueDim / kSlab];
  alignas(1024) Slab64 q[kBackwardStages][kQueryDim / kSlab];
  alignas(1024) Slab64 dout[kBackwardStages][kValueDim / kSlab];
  alignas(128) QueryStatistics statistics[kBackwardStages];
  BackwardBarriers<KeyTile> barriers;
};

// Gradients of queries: 128 queries stay, keys pass.
struct QueryGradientStorage {
  alignas(1024) Slab128 q[kQueryDim / kSlab];
  alignas(1024) Slab128 dout[kValueDim / kSlab];
  alignas(1024) Slab64 k[kBackwardStages][kQueryDim / kSlab];
  alignas(1024) Slab64 v[kBackwardStages][kValueDim / kSlab];
  BackwardBarriers<GradientTile> barriers;
};

// Rows from `first` on belong to another sequence: zeros instead, because zero times NaN is NaN. By one warp.
template <int kSlabs, int kElements>
__device__ __forceinline__ void clear_rows(__nv_bfloat16 (&slabs)[kSlabs][kElements], int first) {
  constexpr int kChunks = kSlab * 2 / 16;
#pragma unroll 1
  for (int chunk = first * kChunks + threadIdx.x % 32; chunk < kElements / 8; chunk += 32) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) reinterpret_cast<uint4*>(slabs[slab])[chunk] = make_uint4(0, 0, 0, 0);
  }
}

// Walks through the tiles that another warp hands on. They stay in shared memory, read when needed: registers are short.
template <class Tile>
struct TileReader {
  BackwardBarriers<Tile>& barriers;
  TwoStage slot;

  __device__ __forceinline__ const Tile& await_tile() {
    barriers.tile_full[slot.stage()].wait(slot.full_parity());
    return barriers.tile[slot.stage()];
  }

  __device__ __forceinline__ void release_tile() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barriers.tile_empty[slot.stage()].arrive();
    ++slot.count;
  }
};

// Of one whole warp: hands tiles on until there are none, the last of which says so.
template <class Tile, class Scheduler>
__device__ __forceinline__ void hand_tiles_on(BackwardBarriers<Tile>& barriers, Scheduler scheduler) {
  TwoStage slot;
  bool is_last = false;
  while (!is_last) {
    const Tile tile = scheduler.next();
    is_last = tile.is_none();
    barriers.tile_empty[slot.stage()].wait(slot.empty_parity());
    if (threadIdx.x % 32 == 0) {
      barriers.tile[slot.stage()] = tile;
      barriers.tile_full[slot.stage()].arrive();
    }
    ++slot.count;
  }
}

// What the warp that loads keeps.
template <class Tile>
struct BackwardProducer : TileReader<Tile> {
  using TileReader<Tile>::barriers;
  RingOf<kBackwardStages> ring;
  uint32_t operands_parity = 0, arrived_parity = 0;

  __device__ __forceinline__ void await_operands_empty() {
    barriers.operands_empty.wait(operands_parity ^ 1);
    operands_parity ^= 1;
  }

  // `load` counts `bytes` on the barrier that it is given. Rows from `num_rows` on of `first` and `second` are cleared.
  template <class Load, class First, class Second>
  __device__ __forceinline__ void fill(Barrier& full, uint32_t bytes, const Load& load, int num_rows, First& first,
                                       Second& second) {
    constexpr int kRows = sizeof(first[0]) / (kSlab * 2);
    const bool mends = num_rows < kRows;
    Barrier& counted = mends ? barriers.arrived : full;
    if (threadIdx.x % 32 == 0) {
      counted.arrive_and_expect(bytes);
      load(counted);
    }
    if (mends) {
      counted.wait(arrived_parity);
      arrived_parity ^= 1;
      clear_rows(first, num_rows);
      clear_rows(second, num_rows);
      fence_async_proxy();
      __syncwarp();
      if (threadIdx.x % 32 == 0) full.arrive();
    }
  }
};

// What a consumer warpgroup keeps.
template <class Storage, class Tile>
struct BackwardConsumer : TileReader<Tile> {
  Storage& storage;
  const MlaBackwardParams& params;
  int warpgroup;
  RingOf<kBackwardStages> ring;  // of the block that comes next
  uint32_t operands_parity = 0;

  __device__ __forceinline__ BackwardConsumer(Storage& storage, const MlaBackwardParams& params)
      : TileReader<Tile>{storage.barriers},
        storage(storage),
        params(params),
        warpgroup(__shfl_sync(~0u, static_cast<int>(threadIdx.x / 128) - 1, 0)) {}

  __device__ __forceinline__ void release(Barrier& empty) const {
    if (threadIdx.x % 32 == 0) empty.arrive();
  }

  __device__ __forceinline__ void await_operands() {
    storage.barriers.operands_full.wait(operands_parity);
    operands_parity ^= 1;
  }

  // Row inside the tile of this thread's first accumulators.
  __device__ __forceinline__ int row() const {
    return warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }
};

}  // namespace dsv3rt
