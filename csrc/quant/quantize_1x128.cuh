// 1x128 tiles of whatever a source yields: one pass by rows, or by rows and columns at once.
//
// A source is made of its Params and the place of a thread's first element; it has Element (what is quantised), Raw
// (eight elements as loaded), and functions to load and convert: load(raw, rows after the first), octet(raw).
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

// x itself.
template <typename Type>
class PlainSource {
 public:
  struct Params {
    const void* x;
    int64_t stride;
  };
  using Element = Type;
  using Raw = Octet<Type>;

  __device__ __forceinline__ PlainSource(const Params& in, int64_t row, int column)
      : first_(static_cast<const Type*>(in.x) + row * in.stride + column), stride_(in.stride) {}
  __device__ __forceinline__ void load(Raw& raw, int r) const { raw.load(first_ + r * stride_); }
  static __device__ __forceinline__ const Octet<Type>& octet(const Raw& raw) { return raw; }

 private:
  const Type* first_;
  int64_t stride_;
};

// Rows of x in another order, or several times: rows[i] is the i-th.
template <typename Type>
class GatheredSource {
 public:
  struct Params {
    const void* x;
    const int* rows;
    int64_t stride;
  };
  using Element = Type;
  using Raw = Octet<Type>;

  // Reads the places of four rows whether they hold data or not, and uses those that do.
  __device__ __forceinline__ GatheredSource(const Params& in, int64_t row, int column)
      : x_(static_cast<const Type*>(in.x) + column), stride_(in.stride) {
    static_assert(kRowsPerThread == 4);
    rows_ = __ldg(reinterpret_cast<const int4*>(in.rows + row));
  }
  __device__ __forceinline__ void load(Raw& raw, int r) const {
    const int row = r == 0 ? rows_.x : r == 1 ? rows_.y : r == 2 ? rows_.z : rows_.w;
    raw.load(x_ + row * stride_);
  }
  static __device__ __forceinline__ const Octet<Type>& octet(const Raw& raw) { return raw; }

 private:
  const Type* x_;
  int64_t stride_;
  int4 rows_;
};

// A thread's part: all loads are in flight before the first use. Zeros past `rows_left`.
template <class Source>
__device__ __forceinline__ void load_octets(const Source& source, int rows_left,
                                            TileOctets<typename Source::Element>& octets) {
  typename Source::Raw raw[kRowsPerThread];
  if (rows_left >= kRowsPerThread) {  // without a condition each, loads follow one another
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) source.load(raw[r], r);
  } else {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      raw[r].clear();
      if (r < rows_left) source.load(raw[r], r);
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) octets[r] = source.octet(raw[r]);
}

// Row form. A warp takes two tiles (256 columns) of four rows: 16 lanes a tile, 8 elements a lane.
constexpr int kRowThreads = 256;
constexpr int kRowBlockRows = kRowThreads / 32 * kRowsPerThread;  // divides 128, so that a block lies in one group
constexpr int kRowBlockColumns = 2 * kTile;

template <class Source>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows_kernel(const typename Source::Params in, const RowGroups groups, const QuantOutput out) {
  const int row_in_block = threadIdx.x / 32 * kRowsPerThread;
  const BlockPosition block(blockIdx.x, out.num_columns, kRowBlockColumns);
  const int column = block.column * kRowBlockColumns + threadIdx.x % 32 * 8;
  const int64_t first_row = block.row * kRowBlockRows, row = first_row + row_in_block;
  const RowCounts counts = count_rows(groups, first_row, out.num_rows, kRowBlockRows);

  TileOctets<typename Source::Element> octets;
  load_octets(Source(in, row, column), column < out.num_columns ? counts.read - row_in_block : 0, octets);
  write_rows<typename Source::Element>(out, row, column, counts.written - row_in_block, octets);
}

// Both forms at once. A block takes a 128x128 tile.
template <class Source>
__global__ void __launch_bounds__(kTileThreads, 2)
    quantize_both_kernel(const typename Source::Params in, const RowGroups groups, const QuantOutput out) {
  using Element = typename Source::Element;
  alignas(16) __shared__ TransposedTile tile;
  __shared__ ColumnScales<Element> columns;
  const TilePlace place = tile_of_block(groups, out.num_rows);
  if (place.rows.written == 0) return;  // past the last group
  const int64_t row = place.first_row + row_in_tile();
  const int column = place.first_column + column_in_tile();
  TileOctets<Element> octets;
  load_octets(Source(in, row, column), column < out.num_columns ? place.rows_to_read() : 0, octets);
  write_tile<Element>(out, place, octets, tile, columns);
}

}  // namespace dsv3rt
