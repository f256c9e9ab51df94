// The warpgroups that multiply. The tensor cores accumulate 128 deep, then the CUDA cores add
// scale_a * scale_b * partial in FP32 while another warpgroup, or this one's next wave, multiplies.
#pragma once

#include <cstddef>
#include <utility>

#include "gemm/epilogue.cuh"
#include "hopper/shared.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_fp8.cuh"

namespace dsv3rt {

// Scales of the one or two 128x128 blocks of B that a tile touches, and what they make of a thread's two row scales.
template <typename C>
struct BlockScales {
  float values[C::kBlockScales];
};

template <typename C>
struct BlockFactors {
  float2 values[C::kBlockScales];

  __device__ __forceinline__ BlockFactors(const BlockScales<C>& scale_b, float2 scale_a) {
#pragma unroll
    for (int i = 0; i < C::kBlockScales; ++i) {
      values[i] = make_float2(scale_a.x * scale_b.values[i], scale_a.y * scale_b.values[i]);
    }
  }
};

// Shared addresses of one consumer, kept in registers. Offsets of a stage are added where they are needed.
template <typename C>
struct ConsumerView {
  using Storage = GemmStorage<C>;

  uint32_t base;
  uint32_t a, b;              // descriptors
  uint32_t scale_a, scale_b;  // of this thread's first row, of its first pair of columns
  int consumer;

  __device__ __forceinline__ explicit ConsumerView(const Storage& storage) {
    const int lane = threadIdx.x % 32;
    base = __shfl_sync(~0u, smem_address(&storage), 0);
    consumer = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    const int first_row = consumer * C::kWaves * kWaveRows;
    a = __shfl_sync(~0u, descriptor_base(base + offsetof(Storage, a) + first_row * kBlockK), 0);
    b = __shfl_sync(~0u, descriptor_base(base + offsetof(Storage, b)), 0);
    scale_a = base + offsetof(Storage, scale_a) + (first_row + threadIdx.x % 128 / 32 * 16 + lane / 4) * 4;
    scale_b = base + offsetof(Storage, scale_b) +
              (C::kPairedRows               ? lane % 4 * 16
               : C::kScaleB == ScaleB::kRow ? lane % 4 * 8
                                            : 0);
  }

  __device__ __forceinline__ uint32_t tile() const { return base + offsetof(Storage, tile); }

  __device__ __forceinline__ void wait(const GemmRing<C>& ring) const {
    BarrierAddress(base + offsetof(Storage, full) + ring.stage * sizeof(Barrier)).wait(ring.parity);
  }

  __device__ __forceinline__ float2 row_scales(int slot, int wave) const {
    const uint32_t address = scale_a + slot * (C::kBlockM * 4) + wave * (kWaveRows * 4);
    return make_float2(load_shared(address), load_shared(address + 8 * 4));
  }

  __device__ __forceinline__ BlockScales<C> block_scales(int stage) const {
    BlockScales<C> scales;
#pragma unroll
    for (int i = 0; i < C::kBlockScales; ++i) {
      scales.values[i] = load_shared(scale_b + stage * (C::kScaleBFloats * 4) + i * 4);
    }
    return scales;
  }

  // Frees a stage for the producers that write it: the own one and, where an operand is shared, the peer's.
  __device__ __forceinline__ void release(int stage) const {
    const BarrierAddress barrier(base + offsetof(Storage, empty) + stage * sizeof(Barrier));
    const int lane = threadIdx.x % 32;
    if constexpr (!C::kMulticast) {
      barrier.arrive_for_warp();
    } else if constexpr (kAllLanesArrive) {
      barrier.arrive_at(0);
      barrier.arrive_at(1);
    } else {
      if (lane < 2) barrier.arrive_at(lane);
    }
  }

  __device__ __forceinline__ void multiply_wave(float (&partial)[C::kFragment], int stage, int wave) const {
    const uint32_t wave_a = a + stage * (C::kBlockM * kBlockK / 16) + wave * (kWaveRows * kBlockK / 16);
    const uint32_t stage_b = b + stage * (C::kBlockN * kBlockK / 16);
    pin_registers(partial);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockK / 32; ++step) {
      WgmmaE4M3<C::kBlockN>::multiply(partial, k_major_swizzle128_descriptor(wave_a + step * 2),
                                      k_major_swizzle128_descriptor(stage_b + step * 2), step != 0);
    }
    wgmma_commit();
    pin_registers(partial);
  }
};

template <typename C>
__device__ __forceinline__ void clear_sums(float (&sum)[C::kWaves][C::kFragment]) {
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
#pragma unroll
    for (int i = 0; i < C::kFragment; ++i) sum[wave][i] = 0;
  }
}

// One body for each place where a tile can cross into the next block of scales: no selection inside.
template <typename C, int kFirstColumns = gcd(C::kBlockN, 128)>
__device__ __forceinline__ void promote_block(float (&sum)[C::kFragment], const float (&partial)[C::kFragment],
                                              const BlockFactors<C>& factors, int first_columns) {
  if constexpr (kFirstColumns < 128) {
    if (first_columns != kFirstColumns) {
      return promote_block<C, kFirstColumns + gcd(C::kBlockN, 128)>(sum, partial, factors, first_columns);
    }
  }
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
    const float2 scale = factors.values[octet * 8 < kFirstColumns ? 0 : 1];
    sum[octet * 4 + 0] += scale.x * partial[octet * 4 + 0];
    sum[octet * 4 + 1] += scale.x * partial[octet * 4 + 1];
    sum[octet * 4 + 2] += scale.y * partial[octet * 4 + 2];
    sum[octet * 4 + 3] += scale.y * partial[octet * 4 + 3];
  }
}

// Scales of two octets of columns: those of this thread's pair in each.
template <typename C>
__device__ __forceinline__ float4 column_scales(uint32_t scale_b, int pair) {
  if constexpr (C::kPairedRows) return load_shared_quad(scale_b + pair * 64);
  const float2 first = load_shared_pair(scale_b + pair * 64), second = load_shared_pair(scale_b + pair * 64 + 32);
  return make_float4(first.x, first.y, second.x, second.y);
}

// Fewest registers are read when the column scales multiply first: each serves two rows, each row scale then all
// columns, and ptxas reuses an operand in neighbouring instructions. With three consumers it finds no room for that.
template <typename C>
__device__ __forceinline__ void promote_row(float (&sum)[C::kFragment], const float (&partial)[C::kFragment],
                                            const float2 scale_a, uint32_t scale_b) {
#pragma unroll
  for (int pair = 0; pair < C::kBlockN / 16; ++pair) {
    const float4 scales = column_scales<C>(scale_b, pair);
    const float columns[4] = {scales.x, scales.y, scales.z, scales.w};
    const auto index = [&](int row, int column) { return pair * 8 + column / 2 * 4 + row * 2 + column % 2; };
    if constexpr (C::kConsumers == 2) {
      float products[2][4];
#pragma unroll
      for (int column = 0; column < 4; ++column) {
#pragma unroll
        for (int row = 0; row < 2; ++row) products[row][column] = columns[column] * partial[index(row, column)];
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int column = 0; column < 4; ++column) {
          sum[index(row, column)] += (row == 0 ? scale_a.x : scale_a.y) * products[row][column];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = i % 4 / 2, column = i / 4 * 2 + i % 2;
        sum[index(row, column)] += (row == 0 ? scale_a.x : scale_a.y) * columns[column] * partial[index(row, column)];
      }
    }
  }
}

// Two waves a consumer: few registers are left beside the sums, so it multiplies and promotes wave by wave, and the
// other consumer keeps the tensor cores busy meanwhile.
template <typename C>
__device__ __forceinline__ void consume_tile_by_waves(const ConsumerView<C>& view, const Tile& tile, GemmRing<C>& ring,
                                                      float (&sum)[C::kWaves][C::kFragment]) {
  static_assert(C::kScaleB == ScaleB::kBlock128);
  const int first_columns = __shfl_sync(~0u, 128 - tile.n % 128, 0);
#pragma unroll 4
  for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block) {
    view.wait(ring);
    const int stage = ring.stage;
    const BlockScales<C> scale_b = view.block_scales(stage);
#pragma unroll
    for (int wave = 0; wave < C::kWaves; ++wave) {
      const float2 scale_a = view.row_scales(stage, wave);
      float partial[C::kFragment];
      view.multiply_wave(partial, stage, wave);
      wgmma_wait<0>();
      pin_registers(partial);
      if (wave == C::kWaves - 1) {
        view.release(stage);
        ring.advance();
      }
      promote_block<C>(sum[wave], partial, BlockFactors<C>(scale_b, scale_a), first_columns);
    }
  }
}

// One wave a consumer. With row scales, promotion takes longer than multiplication: of two consumers each has a K-block
// promoted while its own next one multiplies. Three keep the tensor cores busy by themselves, and so do two
// with block scales.
template <typename C, int kBlocks>
__device__ __forceinline__ void consume_blocks(const ConsumerView<C>& view, GemmRing<C>& ring,
                                               float (&sum)[C::kFragment], int first_columns) {
  constexpr int kPartials = C::kPartials;
  float partial[kPartials][C::kFragment];
  float2 scale_a[kPartials];
  BlockScales<C> scale_b[kPartials];
  const auto multiply = [&]<int kBlock>(const GemmRing<C>& position) {
    view.wait(position);
    if constexpr (C::kScaleB == ScaleB::kBlock128) scale_b[kBlock % kPartials] = view.block_scales(position.stage);
    scale_a[kBlock % kPartials] = view.row_scales(position.scale_slot(), 0);
    view.multiply_wave(partial[kBlock % kPartials], position.stage, 0);
  };
  const auto step = [&]<int kBlock>() {
    GemmRing<C> next = ring;
    next.advance();
    if constexpr (!C::kAhead) multiply.template operator()<kBlock>(ring);
    if constexpr (C::kAhead && kBlock + 1 < kBlocks) {
      multiply.template operator()<kBlock + 1>(next);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    pin_registers(partial[kBlock % kPartials]);
    view.release(ring.stage);
    if constexpr (C::kScaleB == ScaleB::kBlock128) {
      const BlockFactors<C> factors(scale_b[kBlock % kPartials], scale_a[kBlock % kPartials]);
      promote_block<C>(sum, partial[kBlock % kPartials], factors, first_columns);
    } else {
      promote_row<C>(sum, partial[kBlock % kPartials], scale_a[kBlock % kPartials],
                     view.scale_b + ring.scale_slot() * (C::kScaleBFloats * 4));
    }
    ring = next;
  };
  if constexpr (C::kAhead) multiply.template operator()<0>(ring);
  [&]<int... kBlock>(std::integer_sequence<int, kBlock...>) {
    (step.template operator()<kBlock>(), ...);
  }(std::make_integer_sequence<int, kBlocks>{});
}

// ptxas serialises a multiplication that is in flight across the end of a loop, hence bodies of several K-blocks that
// drain at their end.
template <typename C>
__device__ __forceinline__ void consume_tile_by_blocks(const ConsumerView<C>& view, const Tile& tile, GemmRing<C>& ring,
                                                       float (&sum)[C::kFragment]) {
  // Row scales leave few registers: longer bodies would spill.
  constexpr int kUnroll = C::kScaleB == ScaleB::kBlock128 ? 4 : C::kAhead ? 2 : 1;
  static_assert(kUnroll <= C::kStages || !C::kAhead);
  const int first_columns = C::kBlockScales > 1 ? __shfl_sync(~0u, 128 - tile.n % 128, 0) : 128;
  int k_block = 0;
  if constexpr (kUnroll > 1) {
#pragma unroll 1
    for (; k_block + kUnroll <= tile.num_k_blocks; k_block += kUnroll) {
      consume_blocks<C, kUnroll>(view, ring, sum, first_columns);
    }
  }
#pragma unroll 1
  for (; k_block < tile.num_k_blocks; ++k_block) consume_blocks<C, 1>(view, ring, sum, first_columns);
}

// Halves of a depth: the second block hands its sums to the first, which adds them. They pass through the first one's
// ring, which nobody needs any more: such a cluster has one tile. True in the block that now has the whole sums.
template <typename C>
__device__ __forceinline__ bool gather_halves(uint32_t ring, float (&sum)[C::kWaves][C::kFragment]) {
  static_assert(C::kWaves * C::kFragment * 4 * 128 * C::kConsumers <= C::kStages * (C::kBlockM + C::kBlockN) * kBlockK);
  constexpr int kQuadStride = 128 * C::kConsumers * 16;
  const bool gives = cluster_cta_rank() == 1;
  const uint32_t mine = ring + (threadIdx.x - 128) * 16;
  cluster_sync();
  if (gives) {
#pragma unroll
    for (int wave = 0; wave < C::kWaves; ++wave) {
#pragma unroll
      for (int i = 0; i < C::kFragment; i += 4) {
        store_cluster_quad(mine + (wave * C::kFragment + i) / 4 * kQuadStride, 0, &sum[wave][i]);
      }
    }
  }
  cluster_sync();
  if (gives) return false;
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
#pragma unroll
    for (int i = 0; i < C::kFragment; i += 4) {
      const float4 other = load_shared_quad(mine + (wave * C::kFragment + i) / 4 * kQuadStride);
      sum[wave][i + 0] += other.x;
      sum[wave][i + 1] += other.y;
      sum[wave][i + 2] += other.z;
      sum[wave][i + 3] += other.w;
    }
  }
  return true;
}

template <typename C>
__device__ __forceinline__ void consumer_multiply_tiles(GemmStorage<C>& storage, TileScheduler<C> scheduler) {
  const ConsumerView<C> view(storage);
  GemmRing<C> ring;
  Tile tile;
  while (scheduler.next(tile)) {
    float sum[C::kWaves][C::kFragment];
    clear_sums<C>(sum);
    if constexpr (C::kWaves == 1) {
      consume_tile_by_blocks<C>(view, tile, ring, sum[0]);
    } else {
      consume_tile_by_waves<C>(view, tile, ring, sum);
    }
    if constexpr (C::kShare == Share::kDepth) {
      if (!gather_halves<C>(view.base, sum)) return;
    }
    if constexpr (C::kParts > 1) {
      leave_tile_in_parts<C>(view.tile(), view.consumer, sum[0]);
    } else {
      leave_tile<C>(view.tile(), view.consumer, sum);
    }
  }
}

}  // namespace dsv3rt
