// Finished tiles: a consumer leaves its waves in shared memory and goes on; a warp of its own has the copy engine store
// them or add them to what is there. Two named barriers a consumer pass the buffer to and fro.
#pragma once

#include <utility>

#include "gemm/producers.cuh"
#include "gemm/scheduler.cuh"
#include "hopper/arithmetic.cuh"
#include "hopper/fragment.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"

namespace dsv3rt {

constexpr int kHandoverThreads = 128 + 32;  // a consumer and the storing warp

__device__ __forceinline__ int buffer_filled(int consumer) { return 1 + consumer; }
__device__ __forceinline__ int buffer_free(int consumer) { return 4 + consumer; }

// One wave as slabs of 64 rows of 128 bytes, whose 16-byte chunks are permuted by row % 8 as the copy engine does it.
template <typename C>
__device__ __forceinline__ void leave_bf16_wave(uint32_t buffer, const float (&sum)[C::kFragment]) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
  const uint32_t row_address = buffer + (warp_row + lane % 16) * 128;
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; octet += 2) {
    const int chunk = octet % 8 + lane / 16;
    const uint32_t words[4] = {
        pack_bf16(sum[octet * 4 + 0], sum[octet * 4 + 1]), pack_bf16(sum[octet * 4 + 2], sum[octet * 4 + 3]),
        pack_bf16(sum[octet * 4 + 4], sum[octet * 4 + 5]), pack_bf16(sum[octet * 4 + 6], sum[octet * 4 + 7])};
    store_matrices(row_address + octet / 8 * C::kSlabBytes + (chunk ^ (lane % 8)) * 16, words);
  }
}

template <typename C>
__device__ __forceinline__ void leave_fp32_wave(uint32_t buffer, const float (&sum)[C::kFragment]) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
  const uint32_t row_address = buffer + (warp_row + lane / 4) * 128 + lane % 2 * 8;
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
    const int chunk = octet % 4 * 2 + lane % 4 / 2;
    const uint32_t address = row_address + octet / 4 * C::kSlabBytes + (chunk ^ (lane / 4)) * 16;
    store_shared_pair(address, sum[octet * 4 + 0], sum[octet * 4 + 1]);
    store_shared_pair(address + 8 * 128, sum[octet * 4 + 2], sum[octet * 4 + 3]);
  }
}

// With paired rows a thread holds columns 16i + 4q .. + 4 in octets 2i and 2i + 1, q its place in the quad.
template <typename C, int kPart = 0>
__device__ __forceinline__ void leave_paired_wave(uint32_t buffer, const float (&sum)[C::kFragment]) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
  const uint32_t row_address = buffer + (warp_row + lane / 4) * 128;
#pragma unroll
  for (int pair = 0; pair < C::kBlockN / 16 / C::kParts; ++pair) {
    const int byte = (pair * 16 % C::kSlabColumns + lane % 4 * 4) * C::kElementBytes;
    const uint32_t address =
        row_address + pair * 16 / C::kSlabColumns * C::kSlabBytes + ((byte / 16) ^ (lane / 4)) * 16 + byte % 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* values = &sum[(kPart * (C::kBlockN / 16 / C::kParts) + pair) * 8 + half * 2];
      if constexpr (C::kOutput == GemmOutput::kBFloat16) {
        store_shared_pair(address + half * 8 * 128, pack_bf16(values[0], values[1]), pack_bf16(values[4], values[5]));
      } else {
        store_shared_quad(address + half * 8 * 128, separate_copy(values[0]), separate_copy(values[1]),
                          separate_copy(values[4]), separate_copy(values[5]));
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void leave_wave(uint32_t buffer, const float (&sum)[C::kFragment]) {
  if constexpr (C::kPairedRows) {
    leave_paired_wave<C>(buffer, sum);
  } else if constexpr (C::kOutput == GemmOutput::kBFloat16) {
    leave_bf16_wave<C>(buffer, sum);
  } else {
    leave_fp32_wave<C>(buffer, sum);
  }
}

template <typename C>
__device__ __forceinline__ void leave_tile(uint32_t tile_buffer, int consumer,
                                           const float (&sum)[C::kWaves][C::kFragment]) {
  named_barrier_sync(buffer_free(consumer), kHandoverThreads);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
    leave_wave<C>(tile_buffer + (consumer * C::kWaves + wave) * C::kWaveBytes, sum[wave]);
  }
  fence_async_proxy();
  named_barrier_arrive(buffer_filled(consumer), kHandoverThreads);
}

// The same in two parts, one after the other through one buffer.
template <typename C>
__device__ __forceinline__ void leave_tile_in_parts(uint32_t tile_buffer, int consumer,
                                                    const float (&sum)[C::kFragment]) {
  const auto leave = [&]<int kPart>() {
    named_barrier_sync(buffer_free(consumer), kHandoverThreads);
    leave_paired_wave<C, kPart>(tile_buffer + consumer * C::kPartBytes, sum);
    fence_async_proxy();
    named_barrier_arrive(buffer_filled(consumer), kHandoverThreads);
  };
  leave.template operator()<0>();
  leave.template operator()<1>();
}

// Rows and columns past the end of D are clipped by its map, rows past the end of a group wave by wave: what is left of
// them is padding.
template <typename C>
__device__ __forceinline__ void store_waves(uint32_t tile_buffer, const GemmMaps& maps, const Tile& tile,
                                            int consumer) {
  const int z = C::kGrouping == Grouping::kDepth ? tile.group : 0;
#pragma unroll
  for (int wave = consumer * C::kWaves; wave < (consumer + 1) * C::kWaves; ++wave) {
    const int row = tile.m + wave * kWaveRows;
    if (row >= tile.row_end) continue;
#pragma unroll
    for (int slab = 0; slab < C::kBlockN / C::kSlabColumns; ++slab) {
      const uint32_t source = tile_buffer + wave * C::kWaveBytes + slab * C::kSlabBytes;
      const int column = tile.n + slab * C::kSlabColumns;
      if constexpr (C::kOutput == GemmOutput::kFloat32Add) {
        tma_add_3d(maps.d, source, column, row, z);
      } else {
        tma_store_3d(maps.d, source, column, row, z);
      }
    }
  }
  tma_store_commit();
}

// With buffers of half a tile each consumer has a storing warp of its own: none waits for another's.
template <typename C>
__device__ __forceinline__ void storer_empty_parts(GemmStorage<C>& storage, const GemmMaps& maps,
                                                   TileScheduler<C> scheduler, int consumer) {
  constexpr int kSlabs = C::kPartBytes / C::kSlabBytes;
  const bool issues = threadIdx.x % 32 == 0;
  const uint32_t buffer = smem_address(storage.tile) + consumer * C::kPartBytes;
  Tile tile;
  named_barrier_arrive(buffer_free(consumer), kHandoverThreads);
  while (scheduler.next(tile)) {
    const int row = tile.m + consumer * kWaveRows;
    const int z = C::kGrouping == Grouping::kDepth ? tile.group : 0;
#pragma unroll 1
    for (int part = 0; part < C::kParts; ++part) {
      named_barrier_sync(buffer_filled(consumer), kHandoverThreads);
      if (issues && row < tile.row_end) {
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          const int column = tile.n + (part * kSlabs + slab) * C::kSlabColumns;
          if constexpr (C::kOutput == GemmOutput::kFloat32Add) {
            tma_add_3d(maps.d, buffer + slab * C::kSlabBytes, column, row, z);
          } else {
            tma_store_3d(maps.d, buffer + slab * C::kSlabBytes, column, row, z);
          }
        }
        tma_store_commit();
        tma_store_wait_read<0>();
      }
      __syncwarp();
      named_barrier_arrive(buffer_free(consumer), kHandoverThreads);
    }
  }
  if (issues) tma_store_wait_all();
}

// Hands each buffer back as soon as it has been read; the groups of stores end in the order of the consumers.
template <typename C, int... kConsumer>
__device__ __forceinline__ void release_buffers(bool issues, std::integer_sequence<int, kConsumer...>) {
  const auto release = [&]<int kIndex>() {
    if (issues) tma_store_wait_read<C::kConsumers - 1 - kIndex>();
    __syncwarp();
    named_barrier_arrive(buffer_free(kIndex), kHandoverThreads);
  };
  (release.template operator()<kConsumer>(), ...);
}

template <typename C>
__device__ __forceinline__ void storer_empty_tiles(GemmStorage<C>& storage, const GemmMaps& maps,
                                                   TileScheduler<C> scheduler) {
  const bool issues = threadIdx.x % 32 == 0;
  const uint32_t tile_buffer = smem_address(storage.tile);
  Tile tile;
#pragma unroll
  for (int consumer = 0; consumer < C::kConsumers; ++consumer) {
    named_barrier_arrive(buffer_free(consumer), kHandoverThreads);
  }
  while (scheduler.next(tile)) {
#pragma unroll
    for (int consumer = 0; consumer < C::kConsumers; ++consumer) {
      named_barrier_sync(buffer_filled(consumer), kHandoverThreads);
      if (issues) store_waves<C>(tile_buffer, maps, tile, consumer);
    }
    release_buffers<C>(issues, std::make_integer_sequence<int, C::kConsumers>{});
  }
  if (issues) tma_store_wait_all();
}

}  // namespace dsv3rt
