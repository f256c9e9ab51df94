// How a block walks over a matrix, and how a 128x128 tile in its registers leaves as FP8 by rows and by columns.
#pragma once

#include "common/fp8_tile.cuh"
#include "common/math.h"
#include "quant/params.h"

namespace dsv3rt {

// Blocks walk along rows first, in one dimension: any number of rows fits.
struct BlockPosition {
  int column;
  int64_t row;

  __device__ __forceinline__ BlockPosition(unsigned block, int num_columns, int block_columns) {
    const unsigned blocks_a_row = ceil_div(num_columns, block_columns);
    column = block % blocks_a_row;
    row = block / blocks_a_row;
  }
};

// How many of a block's rows hold data; those after them, up to `written`, count as zeros.
struct RowCounts {
  int read, written;
};

// Of the `block_rows` rows from first_row, which lie in one segment. A warp searches 32 offsets at a time.
__device__ __forceinline__ RowCounts count_rows(const RowGroups& groups, int64_t first_row, int64_t num_rows,
                                                int block_rows) {
  const int existing = static_cast<int>(min(num_rows - first_row, int64_t(block_rows)));
  if (groups.counts == nullptr) return {existing, existing};
  int low = 0, high = groups.num_groups;  // the last offset that is not above first_row lies between
  while (low < high) {
    const int step = ceil_div(high - low, 32), index = low + (threadIdx.x % 32 + 1) * step;
    const bool not_above = index <= high && groups.offsets[index] <= first_row;
    low += __popc(__ballot_sync(~0u, not_above)) * step;
    high = min(high, low + step - 1);
  }
  if (low == groups.num_groups) return {0, 0};
  const int before = static_cast<int>(first_row) - groups.offsets[low];
  const int written = min(existing, groups.offsets[low + 1] - static_cast<int>(first_row));
  return {max(0, min(groups.counts[low] - before, written)), written};
}

// Of row lane % 4: the lanes exchange half of their rows each time, so that each ends with one.
template <typename Element>
__device__ __forceinline__ uint32_t shared_amax(const TileOctets<Element>& octets) {
  const bool upper_half = threadIdx.x & 2, odd = threadIdx.x & 1;
  const uint32_t rows[] = {octets[0].amax_bits(), octets[1].amax_bits(), octets[2].amax_bits(), octets[3].amax_bits()};
  uint32_t pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = __shfl_xor_sync(~0u, upper_half ? rows[i] : rows[i + 2], 2);
    pair[i] = max(upper_half ? rows[i + 2] : rows[i], received);
  }
  uint32_t bits = max(odd ? pair[1] : pair[0], __shfl_xor_sync(~0u, odd ? pair[0] : pair[1], 1));
  bits = max(bits, __shfl_xor_sync(~0u, bits, 4));
  return max(bits, __shfl_xor_sync(~0u, bits, 8));
}

// By rows: a thread's eight columns of the `rows_left` rows from `row`, as far as they exist; kWhole: all do. Whole
// warps call it.
template <typename Element, bool kWhole = false>
__device__ __forceinline__ void write_rows(const QuantOutput& out, int64_t row, int column, int rows_left,
                                           const TileOctets<Element>& octets) {
  const TileScale scale = tile_scale(shared_amax<Element>(octets), out.scale_mask);
  const int row_of_scale = threadIdx.x % 16, tile = column / kTile;
  if (row_of_scale < (kWhole ? kRowsPerThread : min(rows_left, kRowsPerThread)) &&
      (kWhole || tile * kTile < out.num_columns)) {
    out.scale[tile * out.scale_stride + row + row_of_scale] = scale.scale;
  }
  const bool in_columns = column < out.num_columns;
  uint8_t* target = out.data + row * out.num_columns + column;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const float inverse = __shfl_sync(~0u, scale.inverse, r, kRowsPerThread);
    if (kWhole || (in_columns && r < rows_left)) {
      *reinterpret_cast<uint2*>(target) = quantize_octet(octets[r], inverse);
    }
    target += out.num_columns;
  }
}

struct TilePlace {
  int64_t first_row;
  int first_column;
  RowCounts rows;

  // Of this thread's rows, counted from its first.
  __device__ __forceinline__ int rows_to_read() const { return rows.read - row_in_tile(); }
  __device__ __forceinline__ int rows_to_write() const { return rows.written - row_in_tile(); }
};

// Blocks that take a tile each come in bands of row tiles: those of a band one below the other, from left to right. So
// the pieces of 128 bytes that lie beside each other in the transposed output are written at the same time, and leave
// the L2 together.
constexpr int kBandTiles = 2;

// That of a block in a grid of tile_grid. Without rows past the last.
__device__ __forceinline__ TilePlace tile_of_block(const RowGroups& groups, int64_t num_rows) {
  const int64_t band = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  TilePlace place{
      (band * kBandTiles + blockIdx.x % kBandTiles) * kTile, static_cast<int>(blockIdx.x / kBandTiles) * kTile, {0, 0}};
  if (place.first_row < num_rows) place.rows = count_rows(groups, place.first_row, num_rows, kTile);
  return place;
}

// Where the threads of a block find the scales of its 128 columns.
template <typename Element>
struct ColumnScales {
  alignas(16) typename Octet<Element>::Pattern warp_amax[kTileWarps][kTile];
  float inverse[kTile];
};

template <typename Element, bool kWhole = false>
__device__ __forceinline__ void write_tile_rows(const QuantOutput& out, const TilePlace& place,
                                                const TileOctets<Element>& octets) {
  write_rows<Element, kWhole>(out, place.first_row + row_in_tile(), place.first_column + column_in_tile(),
                              place.rows_to_write(), octets);
}

// Leaves the inverse scale of each of the block's 128 columns in storage and writes their scales.
template <typename Element, bool kWhole>
__device__ __forceinline__ void reduce_columns(const QuantOutput& out, const TilePlace& place,
                                               const TileOctets<Element>& octets, ColumnScales<Element>& storage) {
  using Part = Octet<Element>;
  uint32_t words[Part::kPatternWords];
#pragma unroll
  for (int i = 0; i < Part::kPatternWords; ++i) {
    words[i] = Part::larger(Part::larger(octets[0].patterns(i), octets[1].patterns(i)),
                            Part::larger(octets[2].patterns(i), octets[3].patterns(i)));
    words[i] = Part::larger(words[i], __shfl_xor_sync(~0u, words[i], 16));
  }
  if (threadIdx.x % 32 < 16) {
    auto* target = reinterpret_cast<uint4*>(&storage.warp_amax[threadIdx.x / 32][column_in_tile()]);
#pragma unroll
    for (int i = 0; i < Part::kPatternWords; i += 4) {
      target[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < kTileWarps; ++w) bits = max(bits, Part::float_bits(storage.warp_amax[w][threadIdx.x]));
    const TileScale tile = tile_scale(bits, out.scale_mask);
    storage.inverse[threadIdx.x] = tile.inverse;
    const int column = place.first_column + threadIdx.x;
    if (kWhole || column < out.num_columns) {
      out.scale_t[place.first_row / kTile * out.scale_t_stride + column] = tile.scale;
    }
  }
  __syncthreads();
}

// Bytes of the rows that hold data: zero times the inverse of a poisoned scale would be NaN.
__device__ __forceinline__ uint32_t row_mask(int rows_left) {
  return rows_left >= 4 ? ~0u : rows_left <= 0 ? 0u : (1u << (8 * rows_left)) - 1;
}

// Calls may follow each other with the same storage: two barriers lie between the last read and the next write of a
// part. kWhole: every row and column of the tile exists.
template <typename Element, bool kWhole = false>
__device__ __forceinline__ void write_tile_columns(const QuantOutput& out, const TilePlace& place,
                                                   const TileOctets<Element>& octets, TransposedTile& tile,
                                                   ColumnScales<Element>& storage) {
  reduce_columns<Element, kWhole>(out, place, octets, storage);
  const uint32_t mask = kWhole ? ~0u : row_mask(place.rows_to_read());
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = column_in_tile() + i;
    const float inverse = storage.inverse[column];
    transposed_word(tile, column) = mask & pack_e4m3(octets[0].get(i) * inverse, octets[1].get(i) * inverse,
                                                     octets[2].get(i) * inverse, octets[3].get(i) * inverse);
  }
  __syncthreads();
  const int64_t padded_rows = round_up(out.num_rows, int64_t(kTile));
  uint8_t* first = out.data_t + place.first_column * padded_rows + place.first_row;
  for_transposed_chunks(tile, [&](int column, int chunk, const uint4& words) {
    if (kWhole || place.first_column + column < out.num_columns) {
      reinterpret_cast<uint4*>(first + column * padded_rows)[chunk] = words;
    }
  });
}

// Both forms of a tile.
template <typename Element, bool kWhole = false>
__device__ __forceinline__ void write_tile(const QuantOutput& out, const TilePlace& place,
                                           const TileOctets<Element>& octets, TransposedTile& tile,
                                           ColumnScales<Element>& storage) {
  write_tile_rows<Element, kWhole>(out, place, octets);
  write_tile_columns<Element, kWhole>(out, place, octets, tile, storage);
}

}  // namespace dsv3rt
