// quantize_128x128: a batch of matrices in 128x128 tiles, one pass; on request the transposed matrices as well.
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

// Where a block's tile lies, and the matrices it belongs to.
template <typename Element>
struct BlockTile {
  const Element* w;
  uint8_t* data;
  uint8_t* data_t;  // null: not asked for
  int matrix, row_tile, column_tile;

  __device__ __forceinline__ explicit BlockTile(const Quantize128x128Params& params) {
    const int column_tiles = ceil_div(params.num_columns, kTile), row_tiles = ceil_div(params.num_rows, kTile);
    column_tile = blockIdx.x % column_tiles;
    row_tile = blockIdx.x / column_tiles % row_tiles;
    matrix = blockIdx.x / column_tiles / row_tiles;
    const int64_t elements = int64_t(params.num_rows) * params.num_columns;
    w = static_cast<const Element*>(params.w) + matrix * params.batch_stride;
    data = params.data + matrix * elements;
    data_t = params.data_t == nullptr ? nullptr : params.data_t + matrix * elements;
  }

  __device__ __forceinline__ void write_scale(const Quantize128x128Params& params, float scale) const {
    const int64_t column_tiles = ceil_div(params.num_columns, kTile), row_tiles = ceil_div(params.num_rows, kTile);
    const int64_t first = matrix * row_tiles * column_tiles;
    params.scale[first + row_tile * column_tiles + column_tile] = scale;
    if (data_t != nullptr) params.scale_t[first + column_tile * row_tiles + row_tile] = scale;
  }
};

template <bool kVectorised, typename Element>
__device__ __forceinline__ void load_octet(Octet<Element>& octet, const Element* source, int columns_left) {
  octet.clear();
  if (kVectorised) {
    if (columns_left > 0) octet.load(source);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < columns_left) octet.set(i, source[i]);
    }
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

// The whole tile has one scale, so its transposed bytes are its bytes, transposed.
template <bool kVectorised, typename Element>
__device__ __forceinline__ void write_transposed(const Quantize128x128Params& params, const BlockTile<Element>& block,
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
  for_transposed_chunks(tile, [&](int column_in_block, int chunk, const uint4& words) {
    const int row = block.row_tile * kTile + chunk * 16, column = block.column_tile * kTile + column_in_block;
    if (column < params.num_columns) {
      uint8_t* target = block.data_t + int64_t(column) * params.num_rows + row;
      write_bytes<kVectorised>(target, words, params.num_rows - row);
    }
  });
}

template <typename Element, bool kVectorised>
__global__ void __launch_bounds__(kTileThreads, 2) quantize_blocks_kernel(const Quantize128x128Params params) {
  alignas(16) __shared__ TransposedTile tile;
  __shared__ uint32_t warp_amax[kTileWarps];
  const BlockTile<Element> block(params);
  const int row = block.row_tile * kTile + row_in_tile(), column = block.column_tile * kTile + column_in_tile();

  TileOctets<Element> octets;
  int columns_left[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    columns_left[r] = row + r < params.num_rows ? params.num_columns - column : 0;
    load_octet<kVectorised>(octets[r], block.w + (row + r) * params.row_stride + column, columns_left[r]);
  }
  uint32_t amax =
      max(max(octets[0].amax_bits(), octets[1].amax_bits()), max(octets[2].amax_bits(), octets[3].amax_bits()));
  amax = __reduce_max_sync(~0u, amax);
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kTileWarps; ++w) amax = max(amax, warp_amax[w]);
  const TileScale scale = tile_scale(amax, params.scale_mask);
  if (threadIdx.x == 0) block.write_scale(params, scale.scale);

  uint2 codes[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    codes[r] = quantize_octet(octets[r], scale.inverse);
    write_bytes<kVectorised>(block.data + int64_t(row + r) * params.num_columns + column, codes[r], columns_left[r]);
  }
  if (block.data_t != nullptr) write_transposed<kVectorised>(params, block, codes, tile);
}

}  // namespace dsv3rt
