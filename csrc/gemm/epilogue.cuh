// From accumulators to memory through shared memory: the copy engine writes (or adds) whole rows while the warpgroup
// goes on with the next tile. Rows are padded so that neither fragment stores nor bulk reads meet bank conflicts.
#pragma once

#include <cuda_bf16.h>

#include "gemm/config.cuh"
#include "gemm/scheduler.cuh"
#include "hopper/memory.cuh"
#include "hopper/tma.cuh"

namespace dsv3rt {

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// 16 rows of a warp, two octets of columns at a time.
template <typename C>
__device__ __forceinline__ void stage_bf16(uint8_t* warp_rows, const float (&sum)[C::kFragment]) {
  const int lane = threadIdx.x % 32;
  uint8_t* row = warp_rows + lane % 16 * C::kStagingPitch + lane / 16 * 16;
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; octet += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_bf16(sum[octet * 4 + i * 2], sum[octet * 4 + i * 2 + 1]);
    store_matrix_x4(row + octet * 16, words);
  }
}

template <typename C>
__device__ __forceinline__ void stage_fp32(uint8_t* warp_rows, const float (&sum)[C::kFragment]) {
  const int lane = threadIdx.x % 32;
  uint8_t* row = warp_rows + lane / 4 * C::kStagingPitch + lane % 4 * 8;
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(row + half * 8 * C::kStagingPitch + octet * 32) =
          make_float2(sum[octet * 4 + half * 2], sum[octet * 4 + half * 2 + 1]);
    }
  }
}

// One row a thread, clipped to the tensor.
template <typename C>
__device__ __forceinline__ void send_row(const GemmParams& params, const Tile& tile, int block_row,
                                         const uint8_t* source) {
  const int row = tile.m + block_row;
  if (row >= tile.row_end) return;
  const int64_t group = C::kGrouping == Grouping::kDepth ? tile.group : 0;
  const int64_t offset = (group * params.m + row) * params.stride_d + tile.n;
  const uint32_t bytes = min(C::kBlockN, params.n - tile.n) * C::kOutputBytes;
  if constexpr (C::kOutput == GemmOutput::kFloat32Add) {
    bulk_add_f32(static_cast<float*>(params.d) + offset, source, bytes);
  } else {
    bulk_store(static_cast<uint8_t*>(params.d) + offset * C::kOutputBytes, source, bytes);
  }
}

template <typename C>
__device__ __forceinline__ void store_tile(GemmStorage<C>& storage, const GemmParams& params, const Tile& tile,
                                           const float (&sum)[C::kWaves][C::kFragment]) {
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
  const int barrier = kStagingBarrier + warpgroup;
  constexpr int kRows = C::kWaves * 64;  // of this warpgroup
  uint8_t* rows = storage.staging + warpgroup * kRows * C::kStagingPitch;

  bulk_wait_read<0>();  // each thread for its own row; then the warpgroup for all
  named_barrier_sync(barrier, 128);
#pragma unroll
  for (int wave = 0; wave < C::kWaves; ++wave) {
    uint8_t* warp_rows = rows + (wave * 64 + threadIdx.x % 128 / 32 * 16) * C::kStagingPitch;
    if constexpr (C::kOutput == GemmOutput::kBFloat16) {
      stage_bf16<C>(warp_rows, sum[wave]);
    } else {
      stage_fp32<C>(warp_rows, sum[wave]);
    }
  }
  fence_async_proxy();
  named_barrier_sync(barrier, 128);
  const int row = threadIdx.x % 128;
  if (row < kRows && tile.n < params.n)
    send_row<C>(params, tile, warpgroup * kRows + row, rows + row * C::kStagingPitch);
  bulk_commit();
}

}  // namespace dsv3rt
