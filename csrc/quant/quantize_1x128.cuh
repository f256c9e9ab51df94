// 1x128 tiles of whatever a source yields: one pass by rows, or by rows and columns at once.
//
// A source has Params, Element (what is quantised), Raw (eight elements as loaded), kRows (a warp's, in the row form),
// and functions to load and convert: load(in, raw, row, column), octet(raw).
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

// x itself.
template <typename Type>
struct PlainSource {
  struct Params {
    const void* x;
    int64_t stride;
  };
  using Element = Type;
  using Raw = Octet<Type>;
  static constexpr int kRows = sizeof(Type) == 2 ? 8 : 4;

  static __device__ __forceinline__ void load(const Params& in, Raw& raw, int64_t row, int column) {
    raw.load(static_cast<const Type*>(in.x) + row * in.stride + column);
  }
  static __device__ __forceinline__ const Octet<Type>& octet(const Raw& raw) { return raw; }
};

// Row form. A warp takes two tiles (256 columns) of kRows rows: 16 lanes a tile, 8 elements a lane, all loads in flight
// before the first use. kRows neighbouring scales are written as float4.
constexpr int kRowThreads = 256;

template <class Source>
struct RowForm {
  static constexpr int kBlockRows = Source::kRows * kRowThreads / 32;  // divides 128, so that a block lies in one group
  static constexpr int kBlockColumns = 2 * kTile;
};

template <class Source>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows_kernel(const typename Source::Params in, const RowGroups groups, const QuantOutput out) {
  constexpr int kRows = Source::kRows;
  using Form = RowForm<Source>;
  const int lane = threadIdx.x % 32, row_in_block = threadIdx.x / 32 * kRows;
  const BlockPosition block(blockIdx.x, out.num_columns, Form::kBlockColumns);
  const int column = block.column * Form::kBlockColumns + lane * 8;
  const int64_t first_row = block.row * Form::kBlockRows, row = first_row + row_in_block;
  const RowCounts counts = count_rows(groups, first_row, out.num_rows, Form::kBlockRows);
  const bool in_columns = column < out.num_columns;
  const int rows_to_read = in_columns ? counts.read - row_in_block : 0;
  const int rows_to_write = in_columns ? counts.written - row_in_block : 0;

  typename Source::Raw raw[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows_to_read) {
      Source::load(in, raw[r], row + r, column);
    } else {
      raw[r].clear();
    }
  }
  float scales[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Octet<typename Source::Element> octet = Source::octet(raw[r]);
    const TileScale tile = tile_scale(lanes_max<16>(octet.amax_bits()), out.scale_mask);
    scales[r] = tile.scale;
    if (r < rows_to_write) {
      auto* target = out.data + (row + r) * out.num_columns + column;
      *reinterpret_cast<uint2*>(target) = quantize_octet(octet, tile.inverse);
    }
  }
  if (lane % 16 == 0) {
    write_scales(out.scale + (column / kTile) * out.scale_stride + row, scales, rows_to_write);
  }
}

// Both forms at once. A block takes a 128x128 tile.
template <class Source>
__global__ void __launch_bounds__(kTileThreads, 2)
    quantize_both_kernel(const typename Source::Params in, const RowGroups groups, const QuantOutput out) {
  using Element = typename Source::Element;
  __shared__ TileStorage<Element> storage;
  const BlockPosition block(blockIdx.x, out.num_columns, kTile);
  const TilePlace place{block.row * kTile, block.column * kTile,
                        count_rows(groups, block.row * kTile, out.num_rows, kTile)};
  if (place.rows.written == 0) return;  // past the last group
  const int64_t row = place.first_row + row_in_tile();
  const int column = place.first_column + column_in_tile();
  const int rows_to_read = column < out.num_columns ? place.rows_to_read() : 0;

  typename Source::Raw raw[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    if (r < rows_to_read) {
      Source::load(in, raw[r], row + r, column);
    } else {
      raw[r].clear();
    }
  }
  TileOctets<Element> octets;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) octets[r] = Source::octet(raw[r]);
  write_tile_rows<Element>(out, place, octets);
  write_tile_columns<Element>(out, place, octets, storage);
}

}  // namespace dsv3rt
