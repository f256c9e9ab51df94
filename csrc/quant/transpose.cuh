// transpose_128x128: a batch of FP8 matrices with a scale for each 128x128 tile, transposed byte by byte.
#pragma once

#include "common/fp8_tile.cuh"
#include "quant/params.h"

namespace dsv3rt {

// Thread (quad = i / 8, i % 8) holds sixteen columns of four rows.
constexpr int kTransposeThreads = kTile * kTile / (kRowsPerThread * 16);

struct SixteenColumns {
  uint4 rows[kRowsPerThread];

  template <bool kVectorised>
  __device__ __forceinline__ void load(const uint8_t* source, const BatchTile& place, int row, int column) {
    const int64_t stride = place.num_columns;
    if (kVectorised && row + kRowsPerThread <= place.num_rows && column < place.num_columns) {
#pragma unroll  // without a condition each, loads follow one another
      for (int r = 0; r < kRowsPerThread; ++r) rows[r] = *reinterpret_cast<const uint4*>(source + r * stride);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      rows[r] = make_uint4(0, 0, 0, 0);
      const int count = place.columns_left(row + r, column);
      if (kVectorised) {
        if (count > 0) rows[r] = *reinterpret_cast<const uint4*>(source + r * stride);
      } else {
        auto* words = reinterpret_cast<uint32_t*>(&rows[r]);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (i < count) words[i / 4] |= uint32_t(source[r * stride + i]) << (i % 4 * 8);
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t word(int row, int i) const {
    const uint4& words = rows[row];
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }
};

template <bool kVectorised>
__global__ void __launch_bounds__(kTransposeThreads, 6)
    transpose_blocks_kernel(const __grid_constant__ Transpose128x128Params params) {
  alignas(16) __shared__ TransposedTile tile;
  const BatchTile place(blockIdx.x, params.num_rows, params.num_columns);
  const int quad = threadIdx.x / 8, column_in_tile = threadIdx.x % 8 * 16;
  const int row = place.first_row() + quad * kRowsPerThread, column = place.first_column() + column_in_tile;

  SixteenColumns held;
  const int64_t first = (int64_t(place.matrix) * params.num_rows + row) * params.num_columns + column;
  held.load<kVectorised>(params.data + first, place, row, column);
  if (threadIdx.x == 0) {
    params.scale_t[place.transposed_scale_place(ceil_div(params.num_rows, kTile))] = params.scale[place.scale_place()];
  }
#pragma unroll
  for (int four = 0; four < 4; ++four) {
    uint32_t words[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) words[r] = held.word(r, four);
    transpose_bytes(words);
#pragma unroll
    for (int i = 0; i < 4; ++i) transposed_word(tile, column_in_tile + four * 4 + i, quad) = words[i];
  }
  __syncthreads();
  write_transposed_chunks<kVectorised, kTransposeThreads>(params.data_t, params.num_rows, place, tile);
}

}  // namespace dsv3rt
