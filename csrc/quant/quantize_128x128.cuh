// quantize_128x128: a batch of matrices in 128x128 tiles, one pass; on request the transposed matrices as well.
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

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

// A multiprocessor holds so many blocks: as many loads under way as registers allow.
template <typename Element, bool kVectorised>
constexpr int kBlocksAtOnce = kVectorised && sizeof(Element) == 2 ? 3 : 2;

template <typename Element, bool kVectorised>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Element, kVectorised>)
    quantize_blocks_kernel(const Quantize128x128Params params) {
  alignas(16) __shared__ TransposedTile tile;
  __shared__ uint32_t warp_amax[kTileWarps];
  const BatchTile place(blockIdx.x, params.num_rows, params.num_columns);
  const int row = place.first_row() + row_in_tile(), column = place.first_column() + column_in_tile();
  const Element* w = static_cast<const Element*>(params.w) + place.matrix * params.batch_stride;

  TileOctets<Element> octets;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const Element* source = w + (row + r) * params.row_stride + column;
    load_octet<kVectorised>(octets[r], source, place.columns_left(row + r, column));
  }
  const uint32_t amax =
      max(max(octets[0].amax_bits(), octets[1].amax_bits()), max(octets[2].amax_bits(), octets[3].amax_bits()));
  const TileScale scale = tile_scale(tile_amax(amax, warp_amax), params.scale_mask);
  if (threadIdx.x == 0) {
    params.scale[place.scale_place()] = scale.scale;
    if (params.data_t != nullptr) {
      params.scale_t[place.transposed_scale_place(ceil_div(params.num_rows, kTile))] = scale.scale;
    }
  }

  uint2 codes[kRowsPerThread];
  uint8_t* data = params.data + (int64_t(place.matrix) * params.num_rows + row) * params.num_columns + column;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    codes[r] = quantize_octet(octets[r], scale.inverse);
    uint8_t* target = data + int64_t(r) * params.num_columns;
    write_bytes<kVectorised>(target, codes[r], place.columns_left(row + r, column));
  }
  if (params.data_t != nullptr) write_transposed<kVectorised>(params.data_t, params.num_rows, place, codes, tile);
}

}  // namespace dsv3rt
