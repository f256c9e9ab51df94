// quantize_1x128: one pass over x; the second kernel also writes x transposed, in 128x1 tiles.
#pragma once

#include "common/math.h"
#include "quant/fp8_cast.cuh"
#include "quant/params.h"

namespace dsv3rt {

constexpr int kQuantThreads = 256;
constexpr int kQuantWarps = kQuantThreads / 32;

// Blocks walk along rows first, in one grid dimension: any number of rows fits.
struct BlockPosition {
  int column;
  int64_t row;

  __device__ __forceinline__ BlockPosition(int num_columns, int block_columns) {
    const int blocks_a_row = ceil_div(num_columns, block_columns);
    column = blockIdx.x % blocks_a_row;
    row = blockIdx.x / blocks_a_row;
  }
};

// Largest amax over the `Width` neighbouring lanes that share a tile.
template <int Width>
__device__ __forceinline__ uint32_t lanes_max(uint32_t bits) {
#pragma unroll
  for (int distance = Width / 2; distance > 0; distance /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, distance));
  return bits;
}

// Row form. A warp takes two tiles (256 columns) of kRows rows: 16 lanes a tile, 8 elements a lane, all loads in flight
// before the first use. kRows neighbouring scales are written as float4.
template <typename Element>
struct RowForm {
  static constexpr int kRows = sizeof(Element) == 2 ? 8 : 4;
  static constexpr int kBlockRows = kRows * kQuantWarps;
  static constexpr int kBlockColumns = 2 * kTile;
};

template <typename Element>
__global__ void __launch_bounds__(kQuantThreads) quantize_rows_kernel(const Quantize1x128Params params) {
  constexpr int kRows = RowForm<Element>::kRows;
  const int lane = threadIdx.x % 32;
  const BlockPosition block(params.num_columns, RowForm<Element>::kBlockColumns);
  const int column = block.column * RowForm<Element>::kBlockColumns + lane * 8;
  const int64_t row = block.row * RowForm<Element>::kBlockRows + threadIdx.x / 32 * kRows;
  const bool in_columns = column < params.num_columns;
  const auto* x = static_cast<const Element*>(params.x) + row * params.x_stride + column;

  Octet<Element> octets[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (in_columns && row + r < params.num_rows) {
      octets[r].load(x + r * params.x_stride);
    } else {
      octets[r].clear();
    }
  }
  float scales[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const TileScale tile = tile_scale(lanes_max<16>(octets[r].amax_bits()), params.pow2_scales);
    scales[r] = tile.scale;
    if (in_columns && row + r < params.num_rows) {
      auto* out = params.data + (row + r) * params.num_columns + column;
      *reinterpret_cast<uint2*>(out) = quantize_octet(octets[r], tile.inverse);
    }
  }
  if (lane % 16 == 0 && in_columns) {
    float* out = params.scale + (column / kTile) * params.scale_stride + row;
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {  // scale_stride is a multiple of 4, so a started float4 fits
      if (row + r < params.num_rows) {
        *reinterpret_cast<float4*>(out + r) = make_float4(scales[r], scales[r + 1], scales[r + 2], scales[r + 3]);
      }
    }
  }
}

// Both forms at once. A block takes a 128 x 128 tile. Thread (warp w, lane) holds rows 16w + 4(lane / 8) .. + 4 and
// columns 8(lane % 8) .. + 8 of each half of 64 columns, so that four rows of a column pack into one word of the
// transposed tile. That tile lies in shared memory as [column][row], its 16-byte chunks permuted by (column / 8) % 8:
// writes and reads are free of bank conflicts.
constexpr int kRowsPerThread = 4;

struct TransposeStorage {
  uint4 tile[kTile][kTile / 16];
  uint32_t warp_amax[kQuantWarps][kTile];
  float inverse[kTile];
};

template <typename Element>
__device__ __forceinline__ void load_tile(const Quantize1x128Params& params, int64_t row, int column,
                                          Octet<Element> (&octets)[kRowsPerThread][2]) {
  const auto* x = static_cast<const Element*>(params.x) + row * params.x_stride + column;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + r < params.num_rows && column + half * 64 < params.num_columns) {
        octets[r][half].load(x + r * params.x_stride + half * 64);
      } else {
        octets[r][half].clear();
      }
    }
  }
}

template <typename Element>
__device__ __forceinline__ void write_rows(const Quantize1x128Params& params, int64_t row, int column,
                                           const Octet<Element> (&octets)[kRowsPerThread][2]) {
  float scales[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const uint32_t amax = max(octets[r][0].amax_bits(), octets[r][1].amax_bits());
    const TileScale tile = tile_scale(lanes_max<8>(amax), params.pow2_scales);
    scales[r] = tile.scale;
    if (row + r >= params.num_rows) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (column + half * 64 < params.num_columns) {
        auto* out = params.data + (row + r) * params.num_columns + column + half * 64;
        *reinterpret_cast<uint2*>(out) = quantize_octet(octets[r][half], tile.inverse);
      }
    }
  }
  if (threadIdx.x % 8 == 0 && row < params.num_rows) {
    float* out = params.scale + (column / kTile) * params.scale_stride + row;
    *reinterpret_cast<float4*>(out) = make_float4(scales[0], scales[1], scales[2], scales[3]);
  }
}

// Leaves the inverse scale of each of the block's 128 columns in storage and writes their scales.
template <typename Element>
__device__ __forceinline__ void reduce_columns(const Quantize1x128Params& params,
                                               const Octet<Element> (&octets)[kRowsPerThread][2],
                                               const BlockPosition& block, TransposeStorage& storage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t bits = 0;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) bits = max(bits, __float_as_uint(octets[r][half].get(i)) & 0x7fffffffu);
      bits = max(bits, __shfl_xor_sync(~0u, bits, 8));
      bits = max(bits, __shfl_xor_sync(~0u, bits, 16));
      if (lane < 8) storage.warp_amax[warp][half * 64 + lane * 8 + i] = bits;
    }
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < kQuantWarps; ++w) bits = max(bits, storage.warp_amax[w][threadIdx.x]);
    const TileScale tile = tile_scale(bits, params.pow2_scales);
    storage.inverse[threadIdx.x] = tile.inverse;
    const int column = block.column * kTile + threadIdx.x;
    if (column < params.num_columns) params.scale_t[block.row * params.scale_t_stride + column] = tile.scale;
  }
  __syncthreads();
}

template <typename Element>
__global__ void __launch_bounds__(kQuantThreads) quantize_both_kernel(const Quantize1x128Params params) {
  __shared__ TransposeStorage storage;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile_column = lane % 8 * 8, tile_row = warp * 16 + lane / 8 * 4;
  const BlockPosition block(params.num_columns, kTile);
  const int column = block.column * kTile + tile_column;
  const int64_t row = block.row * kTile + tile_row;

  Octet<Element> octets[kRowsPerThread][2];
  load_tile(params, row, column, octets);
  write_rows(params, row, column, octets);
  reduce_columns(params, octets, block, storage);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = half * 64 + tile_column + i;
      const float inverse = storage.inverse[c];
      auto* chunk = reinterpret_cast<uint32_t*>(&storage.tile[c][warp ^ (c / 8 % 8)]);
      chunk[lane / 8] = pack_e4m3(octets[0][half].get(i) * inverse, octets[1][half].get(i) * inverse,
                                  octets[2][half].get(i) * inverse, octets[3][half].get(i) * inverse);
    }
  }
  __syncthreads();
  const int64_t padded_rows = round_up(params.num_rows, int64_t(kTile));
#pragma unroll
  for (int c = warp * 4 + lane / 8; c < kTile; c += kQuantWarps * 4) {
    if (block.column * kTile + c < params.num_columns) {
      uint8_t* out = params.data_t + (block.column * kTile + c) * padded_rows + block.row * kTile;
      reinterpret_cast<uint4*>(out)[lane % 8] = storage.tile[c][(lane % 8) ^ (c / 8 % 8)];
    }
  }
}

}  // namespace dsv3rt
