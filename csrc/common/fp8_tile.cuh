// A 128x128 tile in the registers of a block, and how its codes leave transposed.
#pragma once

#include "common/fp8_cast.cuh"
#include "common/math.h"

namespace dsv3rt {

// What a thread holds: eight columns of four rows. Sixteen lanes share the 1x128 tiles of the same rows.
constexpr int kRowsPerThread = 4;

template <typename Element>
using TileOctets = Octet<Element>[kRowsPerThread];

// A block's 128x128 tile. Thread (warp w, lane) holds rows 8w + 4(lane / 16) .. + 4 of columns 8(lane % 16) .. + 8, so
// that four rows of a column pack into one word of the transposed tile.
constexpr int kTileThreads = 512;
constexpr int kTileWarps = kTileThreads / 32;

__device__ __forceinline__ int row_in_tile() { return threadIdx.x / 16 * 4; }
__device__ __forceinline__ int column_in_tile() { return threadIdx.x % 16 * 8; }

// The transposed tile in shared memory: word [column][row / 4], its place permuted by twice (column / 8). So the 32
// words that a warp writes at once lie in 32 banks, and so do the eight 16-byte chunks of a column.
using TransposedTile = uint32_t[kTile][kTile / 4];

// Rows 4 * quad .. + 4 of a column.
__device__ __forceinline__ uint32_t& transposed_word(TransposedTile& tile, int column, int quad) {
  return tile[column][quad ^ (column / 8 * 2)];
}

// Of the rows of this thread.
__device__ __forceinline__ uint32_t& transposed_word(TransposedTile& tile, int column) {
  return transposed_word(tile, column, threadIdx.x / 16);
}

// Rows 16 * chunk .. + 16 of a column.
__device__ __forceinline__ uint4 transposed_chunk(const TransposedTile& tile, int column, int chunk) {
  const int octet = column / 8;
  const uint4 words = reinterpret_cast<const uint4*>(tile[column])[chunk ^ (octet / 2)];
  return octet % 2 ? make_uint4(words.z, words.w, words.x, words.y) : words;
}

// Calls write(column in the tile, chunk, words) for every 16-byte chunk of the transposed tile.
template <int kThreads = kTileThreads, class Write>
__device__ __forceinline__ void for_transposed_chunks(const TransposedTile& tile, Write write) {
#pragma unroll
  for (int column = threadIdx.x / 8; column < kTile; column += kThreads / 8) {
    write(column, static_cast<int>(threadIdx.x % 8), transposed_chunk(tile, column, threadIdx.x % 8));
  }
}

// The first `count` of a run of bytes, which the vectorised form writes whole or not at all.
template <bool kVectorised, typename Words>
__device__ __forceinline__ void write_bytes(uint8_t* target, const Words& words, int count) {
  if (kVectorised) {
    if (count > 0) *reinterpret_cast<Words*>(target) = words;
  } else {
    constexpr int kBytes = sizeof(Words);
    const auto* parts = reinterpret_cast<const uint32_t*>(&words);
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (i < count) target[i] = static_cast<uint8_t>(parts[i / 4] >> (i % 4 * 8));
    }
  }
}

// Rows of four bytes to columns of four bytes.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low_01 = __byte_perm(words[0], words[1], 0x5140), high_01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t low_23 = __byte_perm(words[2], words[3], 0x5140), high_23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low_01, low_23, 0x5410);
  words[1] = __byte_perm(low_01, low_23, 0x7632);
  words[2] = __byte_perm(high_01, high_23, 0x5410);
  words[3] = __byte_perm(high_01, high_23, 0x7632);
}

// The largest magnitude of a whole tile, as bits, from the largest of each thread. All threads of the block call it,
// once a kernel.
__device__ __forceinline__ uint32_t tile_amax(uint32_t amax, uint32_t (&warp_amax)[kTileWarps]) {
  amax = __reduce_max_sync(~0u, amax);
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kTileWarps; ++w) amax = max(amax, warp_amax[w]);
  return amax;
}

// A tile of a batch of matrices; those of a row of tiles follow each other.
struct BatchTile {
  int num_rows, num_columns;  // of a matrix
  int matrix, row_tile, column_tile;

  __device__ __forceinline__ BatchTile(unsigned index, int rows, int columns) : num_rows(rows), num_columns(columns) {
    const unsigned row_tiles = ceil_div(rows, kTile), column_tiles = ceil_div(columns, kTile);
    column_tile = index % column_tiles;
    row_tile = index / column_tiles % row_tiles;
    matrix = index / column_tiles / row_tiles;
  }

  __device__ __forceinline__ int first_row() const { return row_tile * kTile; }
  __device__ __forceinline__ int first_column() const { return column_tile * kTile; }

  // Of row `row`, from `column` on; none past the last row.
  __device__ __forceinline__ int columns_left(int row, int column) const {
    return row < num_rows ? num_columns - column : 0;
  }

  // Of the tile's scale, and of the same in the transposed matrices, where rows of tiles are `stride` apart.
  __device__ __forceinline__ int64_t scale_place() const {
    return (int64_t(matrix) * ceil_div(num_rows, kTile) + row_tile) * ceil_div(num_columns, kTile) + column_tile;
  }
  __device__ __forceinline__ int64_t transposed_scale_place(int64_t stride) const {
    return (int64_t(matrix) * ceil_div(num_columns, kTile) + column_tile) * stride + row_tile;
  }
};

// A transposed tile to where it belongs. Rows of data_t, columns of the matrix, are `stride` apart, those of the next
// matrix behind them.
template <bool kVectorised, int kThreads>
__device__ __forceinline__ void write_transposed_chunks(uint8_t* data_t, int64_t stride, const BatchTile& place,
                                                        const TransposedTile& tile) {
  uint8_t* first =
      data_t + (int64_t(place.matrix) * place.num_columns + place.first_column()) * stride + place.first_row();
  for_transposed_chunks<kThreads>(tile, [&](int column, int chunk, const uint4& words) {
    if (place.first_column() + column < place.num_columns) {
      const int rows_left = place.num_rows - place.first_row() - chunk * 16;
      write_bytes<kVectorised>(first + column * stride + chunk * 16, words, rows_left);
    }
  });
}

// The whole tile has one scale, so its transposed bytes are its bytes, transposed.
template <bool kVectorised>
__device__ __forceinline__ void write_transposed(uint8_t* data_t, int64_t stride, const BatchTile& place,
                                                 const uint2 (&codes)[kRowsPerThread], TransposedTile& tile) {
#pragma unroll
  for (int quad = 0; quad < 2; ++quad) {
    uint32_t words[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) words[r] = quad == 0 ? codes[r].x : codes[r].y;
    transpose_bytes(words);
#pragma unroll
    for (int i = 0; i < 4; ++i) transposed_word(tile, column_in_tile() + quad * 4 + i) = words[i];
  }
  __syncthreads();
  write_transposed_chunks<kVectorised, kTileThreads>(data_t, stride, place, tile);
}

}  // namespace dsv3rt
