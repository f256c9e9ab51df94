// A 128x128 tile in the registers of 256 threads, sixteen columns of four rows each: numbers of one byte are read 16 at
// a time, and what a thread does once is spread over 64 elements. Columns are a multiple of 128, so that every tile has
// all of its own.
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

using BFloat16Octet = Octet<__nv_bfloat16>;
using WideOctets = BFloat16Octet[kRowsPerThread][2];

constexpr int kWideThreads = kTile * kTile / (kRowsPerThread * 16);
constexpr int kWideWarps = kWideThreads / 32;

__device__ __forceinline__ int wide_row(unsigned thread) { return thread / 8 * kRowsPerThread; }
__device__ __forceinline__ int wide_column(unsigned thread) { return thread % 8 * 16; }

// Of row lane % 4 of the eight lanes that share four rows, by the exchange of shared_amax on pairs of magnitudes.
__device__ __forceinline__ uint32_t wide_amax(const WideOctets& octets) {
  const bool upper_half = threadIdx.x & 2, odd = threadIdx.x & 1;
  uint32_t rows[kRowsPerThread], pair[2];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    rows[r] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) rows[r] = BFloat16Octet::larger(rows[r], octets[r][i / 4].patterns(i % 4));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, upper_half ? rows[i] : rows[i + 2], 2);
    pair[i] = BFloat16Octet::larger(upper_half ? rows[i + 2] : rows[i], received);
  }
  const uint32_t received = __shfl_xor_sync(~0u, odd ? pair[0] : pair[1], 1);
  uint32_t magnitudes = BFloat16Octet::larger(odd ? pair[1] : pair[0], received);
  magnitudes = BFloat16Octet::larger(magnitudes, __shfl_xor_sync(~0u, magnitudes, 4));
  return max(magnitudes << 16, magnitudes & 0xffff0000u);
}

// A thread's four rows from `row`, `rows_left` of which exist, from `column`; kWhole: all of them do.
template <bool kWhole>
struct WideRows {
  const QuantOutput& out;
  int64_t row;
  int column, rows_left;

  // Writes scales and yields their inverses.
  __device__ __forceinline__ void scale(const WideOctets& octets, float (&inverse)[kRowsPerThread]) const {
    const TileScale scale = tile_scale(wide_amax(octets), out.scale_mask);
    const int row_of_scale = threadIdx.x % 8, tile = column / kTile;
    if (row_of_scale < (kWhole ? kRowsPerThread : min(rows_left, kRowsPerThread))) {
      out.scale[tile * out.scale_stride + row + row_of_scale] = scale.scale;
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) inverse[r] = __shfl_sync(~0u, scale.inverse, r, kRowsPerThread);
  }

  __device__ __forceinline__ void write(int r, const uint4& codes) const {
    if (kWhole || r < rows_left) *reinterpret_cast<uint4*>(out.data + (row + r) * out.num_columns + column) = codes;
  }
};

struct WideColumnScales {
  alignas(16) uint16_t warp_amax[kWideWarps][kTile];
  alignas(16) float inverse[kTile];
};

// Four lanes share sixteen columns: they exchange halves, so that each ends with four columns of its warp's 16 rows.
__device__ __forceinline__ void write_warp_amax(const WideOctets& octets, WideColumnScales& storage) {
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  uint32_t words[8], half[4], quarter[2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    words[i] = octets[0][i / 4].patterns(i % 4);
#pragma unroll
    for (int r = 1; r < kRowsPerThread; ++r) {
      words[i] = BFloat16Octet::larger(words[i], octets[r][i / 4].patterns(i % 4));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, upper ? words[i] : words[i + 4], 16);
    half[i] = BFloat16Octet::larger(upper ? words[i + 4] : words[i], received);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? half[i] : half[i + 2], 8);
    quarter[i] = BFloat16Octet::larger(odd ? half[i + 2] : half[i], received);
  }
  uint16_t* target = &storage.warp_amax[threadIdx.x / 32][wide_column(threadIdx.x) + (upper ? 8 : 0) + (odd ? 4 : 0)];
  *reinterpret_cast<uint2*>(target) = make_uint2(quarter[0], quarter[1]);
}

// As reduce_columns.
__device__ __forceinline__ void reduce_wide_columns(const QuantOutput& out, const TilePlace& place,
                                                    const WideOctets& octets, WideColumnScales& storage) {
  write_warp_amax(octets, storage);
  __syncthreads();
  if (threadIdx.x < kTile) {
    uint32_t magnitude = 0;
#pragma unroll
    for (int w = 0; w < kWideWarps; ++w) magnitude = max(magnitude, uint32_t(storage.warp_amax[w][threadIdx.x]));
    const TileScale tile = tile_scale(magnitude << 16, out.scale_mask);
    storage.inverse[threadIdx.x] = tile.inverse;
    out.scale_t[place.first_row / kTile * out.scale_t_stride + place.first_column + threadIdx.x] = tile.scale;
  }
  __syncthreads();
}

// Once all threads have left their words there.
__device__ __forceinline__ void write_wide_columns(const QuantOutput& out, const TilePlace& place,
                                                   const TransposedTile& tile) {
  __syncthreads();
  const int64_t padded_rows = round_up(out.num_rows, int64_t(kTile));
  uint8_t* first = out.data_t + place.first_column * padded_rows + place.first_row;
  const unsigned thread = thread_idx_read_here();  // no address is made before the tile is there
  const int chunk = thread % 8;
#pragma unroll
  for (int i = 0; i < kTile * 8 / kWideThreads; ++i) {
    const int column = thread / 8 + i * (kWideThreads / 8);
    reinterpret_cast<uint4*>(first + column * padded_rows)[chunk] = transposed_chunk(tile, column, chunk);
  }
}

// Both forms, or by columns alone. Calls may follow each other with the same storage, as those of write_tile_columns.
template <bool kWithRows, bool kWhole>
__device__ __forceinline__ void write_wide_tile(const QuantOutput& out, const TilePlace& place,
                                                const WideOctets& octets, TransposedTile& tile,
                                                WideColumnScales& storage) {
  const unsigned thread = thread_idx_read_here();
  const WideRows<kWhole> rows{out, place.first_row + wide_row(thread), place.first_column + wide_column(thread),
                              place.rows.written - wide_row(thread)};
  float row_inverse[kRowsPerThread];
  if (kWithRows) rows.scale(octets, row_inverse);
  reduce_wide_columns(out, place, octets, storage);

  const uint32_t mask = kWhole ? ~0u : row_mask(place.rows.read - wide_row(thread));
  uint32_t codes[kRowsPerThread][4];
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    const float4 inverses = *reinterpret_cast<const float4*>(storage.inverse + wide_column(thread) + quad * 4);
    const float column_inverse[4] = {inverses.x, inverses.y, inverses.z, inverses.w};
    float x[kRowsPerThread][4];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[r][i] = octets[r][quad / 2].get(quad % 2 * 4 + i);
      if (kWithRows) {
        codes[r][quad] = pack_e4m3(x[r][0] * row_inverse[r], x[r][1] * row_inverse[r], x[r][2] * row_inverse[r],
                                   x[r][3] * row_inverse[r]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      transposed_word(tile, wide_column(thread) + quad * 4 + i, thread / 8) =
          mask & pack_e4m3(x[0][i] * column_inverse[i], x[1][i] * column_inverse[i], x[2][i] * column_inverse[i],
                           x[3][i] * column_inverse[i]);
    }
  }
  if (kWithRows) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      rows.write(r, make_uint4(codes[r][0], codes[r][1], codes[r][2], codes[r][3]));
    }
  }
  write_wide_columns(out, place, tile);
}

}  // namespace dsv3rt
