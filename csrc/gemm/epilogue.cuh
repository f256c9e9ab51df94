// From accumulators to memory, without shared memory: lanes of a quad swap words so that each stores 16 bytes in a row.
#pragma once

#include <cuda_bf16.h>

#include "gemm/config.cuh"
#include "gemm/scheduler.cuh"
#include "hopper/fragment.cuh"
#include "hopper/memory.cuh"

namespace dsv3rt {

template <typename C>
__device__ __forceinline__ void store_bf16(__nv_bfloat16* row0, __nv_bfloat16* row8, bool in_row0, bool in_row8,
                                           int columns_left, const float (&sum)[C::kFragment]) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; octet += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = pack_bf16(sum[(octet + i) * 4 + half * 2], sum[(octet + i) * 4 + half * 2 + 1]);
      transpose_quad(words);
      const int column = (octet + quad_lane) * 8;
      if ((half ? in_row8 : in_row0) && column < columns_left) {
        *reinterpret_cast<uint4*>((half ? row8 : row0) + column) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void store_fp32(float* row0, float* row8, bool in_row0, bool in_row8, int columns_left,
                                           const float (&sum)[C::kFragment]) {
#pragma unroll
  for (int octet = 0; octet < C::kBlockN / 8; ++octet) {
    const int column = octet * 8 + threadIdx.x % 4 * 2;
    if (column >= columns_left) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!(half ? in_row8 : in_row0)) continue;
      float* target = (half ? row8 : row0) + column;
      const float x = sum[octet * 4 + half * 2], y = sum[octet * 4 + half * 2 + 1];
      if constexpr (C::kOutput == GemmOutput::kFloat32Add) {
        add_to_global(target, x, y);
      } else {
        *reinterpret_cast<float2*>(target) = make_float2(x, y);
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void store_wave(const GemmParams& params, const Tile& tile, int wave,
                                           const float (&sum)[C::kFragment]) {
  const int warpgroup = threadIdx.x / 128 - 1;
  const int row = tile.m + (warpgroup * C::kWaves + wave) * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const bool in_row0 = row < tile.row_end, in_row8 = row + 8 < tile.row_end;
  const int64_t group = C::kGrouping == Grouping::kDepth ? tile.group : 0;
  const int64_t offset = (group * params.m + row) * params.stride_d + tile.n;
  const int columns_left = params.n - tile.n;
  if constexpr (C::kOutput == GemmOutput::kBFloat16) {
    auto* target = static_cast<__nv_bfloat16*>(params.d) + offset;
    store_bf16<C>(target, target + 8 * params.stride_d, in_row0, in_row8, columns_left, sum);
  } else {
    auto* target = static_cast<float*>(params.d) + offset;
    store_fp32<C>(target, target + 8 * params.stride_d, in_row0, in_row8, columns_left, sum);
  }
}

}  // namespace dsv3rt
