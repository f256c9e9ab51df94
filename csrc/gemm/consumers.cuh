// The warpgroups that multiply. The tensor cores accumulate 128 deep, then the CUDA cores add
// scale_a * scale_b * partial in FP32 while another warpgroup, or this one's next wave, multiplies.
#pragma once

#include <cstddef>
#include <utility>

#include "gemm/epilogue.cuh"
#include "gemm/ring.cuh"
#include "hopper/shared.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_fp8.cuh"

namespace dsv3rt {

// Shared addresses of one consumer, kept in registers. Offsets of a stage are added where they are needed.
template <typename C>
struct ConsumerView {
  using Storage = GemmStorage<C>;

  uint32_t a, b;              // descriptors
  uint32_t scale_a, scale_b;  // of this thread's first row, of its first pair of columns
  uint32_t full, empty;
  uint32_t tile;
  int consumer;

  __device__ __forceinline__ explicit ConsumerView(const Storage& storage) {
    const int lane = threadIdx.x % 32;
    const uint32_t base = __shfl_sync(~0u, smem_address(&storage), 0);
    consumer = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
    const int first_row = consumer * C::kWaves * kWaveRows;
    a = __shfl_sync(~0u, descriptor_base(base + offsetof(Storage, a) + first_row * kBlockK), 0);
    b = __shfl_sync(~0u, descriptor_base(base + offsetof(Storage, b)), 0);
    scale_a = base + offsetof(Storage, scale_a) + (first_row + threadIdx.x % 128 / 32 * 16 + lane / 4) * 4;
    scale_b = base + offsetof(Storage, scale_b) +
              (C::kPairedRows ? lane % 4 * 16 : C::kScaleB == ScaleB::kRow ? lane % 4 * 8 : 0);
    full = base + offsetof(Storage, full);
    empty = base + offsetof(Storage, empty);
    tile = base + offsetof(Storage, tile);
  }

  __device__ __forceinline__ float2 row_scales(int stage, int wave) const {
    const uint32_t address = scale_a + stage * (C::kBlockM * 4) + wave * (kWaveRows * 4);
    return make_float2(load_shared(address), load_shared(address + 8 * 4));
  }

  // Frees a stage for the producers that write it: the own one and, where an operand is shared, the peer's.
  __device__ __forceinline__ void release(int stage) const {
    const BarrierAddress barrier(empty + stage * sizeof(Barrier));
    const int lane = threadIdx.x % 32;
    if constexpr (C::kShare == Share::kNone) {
      if (lane == 0) barrier.arrive();
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
                                              const float2 (&factor)[C::kBlockScales], int first_columns) {
  if constexpr (kFirstColumns < 128) {
    if (first_columns != kFirstColumns) {
      return promote_block<C, kFirstColumns + gcd(C::kBlockN, 128)>(sum, partial, factor, first_columns);
    }
  }
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
    const float2 scale = factor[octet * 8 < kFirstColumns ? 0 : 1];
    sum[octet * 4 + 0] += scale.x * partial[octet * 4 + 0];
    sum[octet * 4 + 1] += scale.x * partial[octet * 4 + 1];
    sum[octet * 4 + 2] += scale.y * partial[octet * 4 + 2];
    sum[octet * 4 + 3] += scale.y * partial[octet * 4 + 3];
  }
}

// Scales of B by blocks: few registers are left beside the sums, so a consumer multiplies and promotes wave by wave and
// leaves it to the other consumers to keep the tensor cores busy meanwhile.
template <typename C>
__device__ __forceinline__ void consume_tile_block_scaled(const ConsumerView<C>& view, const Tile& tile,
                                                          RingPosition<C::kStages>& ring,
                                                          float (&sum)[C::kWaves][C::kFragment]) {
  const int first_columns = __shfl_sync(~0u, 128 - tile.n % 128, 0);
  clear_sums<C>(sum);
#pragma unroll 4
  for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block) {
    BarrierAddress(view.full + ring.stage * sizeof(Barrier)).wait(ring.parity);
    const int stage = ring.stage;
    float scale_b[C::kBlockScales];
#pragma unroll
    for (int i = 0; i < C::kBlockScales; ++i) scale_b[i] = load_shared(view.scale_b + stage * 16 + i * 4);
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
      float2 factor[C::kBlockScales];
#pragma unroll
      for (int i = 0; i < C::kBlockScales; ++i) {
        factor[i] = make_float2(scale_a.x * scale_b[i], scale_a.y * scale_b[i]);
      }
      promote_block<C>(sum[wave], partial, factor, first_columns);
    }
  }
}

// Scales of two octets of columns: those of this thread's pair in each.
template <typename C>
__device__ __forceinline__ float4 column_scales(uint32_t scale_b, int pair) {
  if constexpr (C::kPairedRows) return load_shared_quad(scale_b + pair * 64);
  const float2 first = load_shared_pair(scale_b + pair * 64), second = load_shared_pair(scale_b + pair * 64 + 32);
  return make_float4(first.x, first.y, second.x, second.y);
}

template <typename C>
__device__ __forceinline__ void promote_row(float (&sum)[C::kFragment], const float (&partial)[C::kFragment],
                                            const float2 scale_a, uint32_t scale_b) {
#pragma unroll
  for (int pair = 0; pair < C::kBlockN / 16; ++pair) {
    const float4 scales = column_scales<C>(scale_b, pair);
    const float columns[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int index = pair * 8 + octet * 4 + i;
        sum[index] += (i < 2 ? scale_a.x : scale_a.y) * columns[octet * 2 + i % 2] * partial[index];
      }
    }
  }
}

// Scales of B by rows: promotion takes about as long as multiplication. Three consumers keep the tensor cores busy by
// themselves; two have each K-block promoted while their own next one multiplies (kAhead).
template <typename C, int kBlocks, bool kAhead>
__device__ __forceinline__ void consume_row_scaled(const ConsumerView<C>& view, RingPosition<C::kStages>& ring,
                                                   float (&sum)[C::kFragment]) {
  constexpr int kPartials = kAhead ? 2 : 1;
  float partial[kPartials][C::kFragment];
  float2 scale_a[kPartials];
  const auto multiply = [&]<int kBlock>(const RingPosition<C::kStages>& position) {
    BarrierAddress(view.full + position.stage * sizeof(Barrier)).wait(position.parity);
    scale_a[kBlock % kPartials] = view.row_scales(position.stage, 0);
    view.multiply_wave(partial[kBlock % kPartials], position.stage, 0);
  };
  const auto step = [&]<int kBlock>() {
    RingPosition<C::kStages> next = ring;
    next.advance();
    if constexpr (!kAhead) multiply.template operator()<kBlock>(ring);
    if constexpr (kAhead && kBlock + 1 < kBlocks) {
      multiply.template operator()<kBlock + 1>(next);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    pin_registers(partial[kBlock % kPartials]);
    promote_row<C>(sum, partial[kBlock % kPartials], scale_a[kBlock % kPartials],
                   view.scale_b + ring.stage * (C::kScaleBFloats * sizeof(float)));
    view.release(ring.stage);
    ring = next;
  };
  if constexpr (kAhead) multiply.template operator()<0>(ring);
  [&]<int... kBlock>(std::integer_sequence<int, kBlock...>) {
    (step.template operator()<kBlock>(), ...);
  }(std::make_integer_sequence<int, kBlocks>{});
}

// ptxas serialises a multiplication that is in flight across the end of a loop, hence bodies of several K-blocks that
// drain at their end.
template <typename C>
__device__ __forceinline__ void consume_tile_row_scaled(const ConsumerView<C>& view, const Tile& tile,
                                                        RingPosition<C::kStages>& ring,
                                                        float (&sum)[C::kWaves][C::kFragment]) {
  static_assert(C::kWaves == 1);
  constexpr bool kAhead = C::kConsumers == 2;
  constexpr int kUnroll = C::kStages < 4 || C::kOutput == GemmOutput::kBFloat16 ? 2 : 4;
  clear_sums<C>(sum);
  int k_block = 0;
#pragma unroll 1
  for (; k_block + kUnroll <= tile.num_k_blocks; k_block += kUnroll) {
    consume_row_scaled<C, kUnroll, kAhead>(view, ring, sum[0]);
  }
#pragma unroll 1
  for (; k_block < tile.num_k_blocks; ++k_block) consume_row_scaled<C, 1, kAhead>(view, ring, sum[0]);
}

template <typename C>
__device__ __forceinline__ void consumer_multiply_tiles(GemmStorage<C>& storage, TileScheduler<C> scheduler) {
  const ConsumerView<C> view(storage);
  RingPosition<C::kStages> ring;
  Tile tile;
  while (scheduler.next(tile)) {
    float sum[C::kWaves][C::kFragment];
    if constexpr (C::kScaleB == ScaleB::kBlock128) {
      consume_tile_block_scaled<C>(view, tile, ring, sum);
    } else {
      consume_tile_row_scaled<C>(view, tile, ring, sum);
    }
    leave_tile<C>(view.tile, view.consumer, sum);
  }
}

}  // namespace dsv3rt
