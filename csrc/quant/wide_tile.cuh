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

struct WideColumnScales {
  alignas(16) uint16_t warp_amax[kWideWarps][kTile];
  alignas(16) float inverse[kTile];
};

// Of a thread's rows and of its pairs of columns, as patterns.
struct WideMagnitudes {
  uint32_t rows[kRowsPerThread], columns[8];

  __device__ __forceinline__ explicit WideMagnitudes(const WideOctets& octets) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = octets[r][i / 4].patterns(i % 4);
        rows[r] = i == 0 ? pair : BFloat16Octet::larger(rows[r], pair);
        columns[i] = r == 0 ? pair : BFloat16Octet::larger(columns[i], pair);
      }
    }
  }

  // Of row lane % 4 of the eight lanes that share four rows, by the exchange of shared_amax.
  __device__ __forceinline__ uint32_t row_amax() const {
    const unsigned thread = thread_idx_read_here();
    const bool upper_half = thread & 2, odd = thread & 1;
    uint32_t pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t received = __shfl_xor_sync(~0u, upper_half ? rows[i] : rows[i + 2], 2);
      pair[i] = BFloat16Octet::larger(upper_half ? rows[i + 2] : rows[i], received);
    }
    const uint32_t received = __shfl_xor_sync(~0u, odd ? pair[0] : pair[1], 1);
    uint32_t largest = BFloat16Octet::larger(odd ? pair[1] : pair[0], received);
    largest = BFloat16Octet::larger(largest, __shfl_xor_sync(~0u, largest, 4));
    return max(largest << 16, largest & 0xffff0000u);
  }

  // Four lanes share sixteen columns: they exchange halves, so that each ends with four columns of its warp's 16 rows.
  __device__ __forceinline__ void write_columns(unsigned thread, WideColumnScales& storage) const {
    const bool upper = thread & 16, odd = thread & 8;
    uint32_t half[4], quarter[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t received = __shfl_xor_sync(~0u, upper ? columns[i] : columns[i + 4], 16);
      half[i] = BFloat16Octet::larger(upper ? columns[i + 4] : columns[i], received);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t received = __shfl_xor_sync(~0u, odd ? half[i] : half[i + 2], 8);
      quarter[i] = BFloat16Octet::larger(odd ? half[i + 2] : half[i], received);
    }
    uint16_t* target = &storage.warp_amax[thread / 32][wide_column(thread) + (upper ? 8 : 0) + (odd ? 4 : 0)];
    *reinterpret_cast<uint2*>(target) = make_uint2(quarter[0], quarter[1]);
  }
};

// A thread's four rows from `row`, `rows_left` of which exist, from `column`.
struct WideRows {
  const QuantOutput& out;
  int64_t row;
  int column, rows_left;

  // Writes scales and yields the inverse of that of row lane % 4.
  __device__ __forceinline__ float scale(const WideMagnitudes& magnitudes) const {
    const TileScale scale = tile_scale(magnitudes.row_amax(), out.scale_mask);
    const int row_of_scale = thread_idx_read_here() % 8, tile = column / kTile;
    if (row_of_scale < min(rows_left, kRowsPerThread)) {
      out.scale[tile * out.scale_stride + row + row_of_scale] = scale.scale;
    }
    return scale.inverse;
  }

  __device__ __forceinline__ void write(int r, const uint4& codes) const {
    if (r < rows_left) *reinterpret_cast<uint4*>(out.data + (row + r) * out.num_columns + column) = codes;
  }
};

// From the lanes of the rows to all that share them.
__device__ __forceinline__ void share_inverse(float own, float (&inverse)[kRowsPerThread]) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) inverse[r] = __shfl_sync(~0u, own, r, kRowsPerThread);
}

// As reduce_columns.
__device__ __forceinline__ void reduce_wide_columns(const QuantOutput& out, const TilePlace& place,
                                                    const WideMagnitudes& magnitudes, unsigned thread,
                                                    WideColumnScales& storage) {
  magnitudes.write_columns(thread, storage);
  __syncthreads();
  if (thread < kTile) {
    uint32_t magnitude = 0;
#pragma unroll
    for (int w = 0; w < kWideWarps; ++w) magnitude = max(magnitude, uint32_t(storage.warp_amax[w][thread]));
    const TileScale tile = tile_scale(magnitude << 16, out.scale_mask);
    storage.inverse[thread] = tile.inverse;
    out.scale_t[place.first_row / kTile * out.scale_t_stride + place.first_column + thread] = tile.scale;
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
template <bool kWithRows>
__device__ __forceinline__ void write_wide_tile(const QuantOutput& out, const TilePlace& place,
                                                const WideOctets& octets, TransposedTile& tile,
                                                WideColumnScales& storage) {
  const unsigned thread = thread_idx_read_here();  // in a loop, too, nothing that follows from it is kept
  const WideRows rows{out, place.first_row + wide_row(thread), place.first_column + wide_column(thread),
                      place.rows.written - wide_row(thread)};
  const WideMagnitudes magnitudes(octets);
  float own_inverse = 0.0f, row_inverse[kRowsPerThread];
  if (kWithRows) own_inverse = rows.scale(magnitudes);
  reduce_wide_columns(out, place, magnitudes, thread, storage);
  share_inverse(own_inverse, row_inverse);

  const uint32_t mask = row_mask(place.rows.read - wide_row(thread));
  uint32_t codes[kRowsPerThread][4];
  float4 inverses;
#pragma unroll
  for (int pair = 0; pair < 8; ++pair) {  // four columns at once need too many registers
    if (pair % 2 == 0) inverses = *reinterpret_cast<const float4*>(storage.inverse + wide_column(thread) + pair * 2);
    const float2 column_inverse =
        pair % 2 == 0 ? make_float2(inverses.x, inverses.y) : make_float2(inverses.z, inverses.w);
    float2 x[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const BFloat16Octet& octet = octets[r][pair / 4];
      x[r] = make_float2(octet.get(pair % 4 * 2), octet.get(pair % 4 * 2 + 1));
      if (kWithRows) {
        const uint32_t two = pack_e4m3(x[r].x * row_inverse[r], x[r].y * row_inverse[r]);
        codes[r][pair / 2] = pair % 2 == 0 ? two : codes[r][pair / 2] | two << 16;
      }
    }
    transposed_word(tile, wide_column(thread) + pair * 2, thread / 8) =
        mask & pack_e4m3(x[0].x * column_inverse.x, x[1].x * column_inverse.x, x[2].x * column_inverse.x,
                         x[3].x * column_inverse.x);
    transposed_word(tile, wide_column(thread) + pair * 2 + 1, thread / 8) =
        mask & pack_e4m3(x[0].y * column_inverse.y, x[1].y * column_inverse.y, x[2].y * column_inverse.y,
                         x[3].y * column_inverse.y);
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
