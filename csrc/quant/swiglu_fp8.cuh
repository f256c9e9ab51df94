// SwiGLU of FP8 with its cast: sixteen columns of four rows a thread; F a multiple of 128. Everything arrives by one
// wait, which loads into registers do not promise: the compiler may put some of them behind another wait.
#pragma once

#include "quant/fused_factors.cuh"
#include "quant/wide_tile.cuh"

namespace dsv3rt {

// Eight of the sixteen columns of a thread, of row `row` of the factors.
__device__ __forceinline__ GateUp<__nv_fp8_e4m3> octet_of_codes(const uint4& gates, const uint4& ups, int half,
                                                                const WarpFactors& factors, int row) {
  GateUp<__nv_fp8_e4m3> octet;
  octet.set(half == 0 ? make_uint2(gates.x, gates.y) : make_uint2(gates.z, gates.w),
            half == 0 ? make_uint2(ups.x, ups.y) : make_uint2(ups.z, ups.w), factors.gate_scale[row],
            factors.up_scale[row]);
  return octet;
}

using WideSlots = uint4[kRowsPerThread][kWideThreads];  // sixteen bytes a row, for each thread

// Each thread copies the codes that it will read itself. `row`: the first of the sixteen of this warp, `rows_left` of
// which exist.
__device__ __forceinline__ void copy_wide_codes(const GateUpInput& in, int64_t row, int column, int rows_left,
                                                WideSlots& gate, WideSlots& up, WarpFactors& factors) {
  const int first = wide_row(threadIdx.x) % kFactorRows;
  const auto* source = static_cast<const uint8_t*>(in.data) + (row + first) * in.stride + column;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r, source += in.stride) {
    copy_async<16>(&gate[r][threadIdx.x], source, first + r < rows_left);
    copy_async<16>(&up[r][threadIdx.x], source + in.hidden, first + r < rows_left);
  }
  factors.copy(in, row, column / kTile, rows_left);
}

struct WideCodes {
  WideSlots gate, up;
  WarpFactors factors[kWideWarps];

  __device__ __forceinline__ void copy(const GateUpInput& in, int64_t row, int column, int rows_left) {
    copy_wide_codes(in, row, column, rows_left, gate, up, factors[threadIdx.x / 32]);
    copy_async_commit();
  }

  // Waits for the copies. Whole warps call it.
  template <bool kWeighted>
  __device__ __forceinline__ void multiply_all(int rows_left, WideOctets& products) {
    copy_async_wait<0>();
    WarpFactors& own = factors[threadIdx.x / 32];
    const bool fused = own.fuse<kWeighted>(rows_left);
    const auto multiply_rows = [&](auto multiply_octet) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const int row = wide_row(threadIdx.x) % kFactorRows + r;
        const uint4 gates = gate[r][threadIdx.x], ups = up[r][threadIdx.x];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          products[r][half] = multiply_octet(octet_of_codes(gates, ups, half, own, row), row);
        }
      }
    };
    if (fused) {
      multiply_rows([&](const auto& in, int row) { return multiply_codes(in, own.fused[row]); });
    } else {
      multiply_rows(
          [&](const auto& in, int row) { return multiply<kWeighted>(in, kWeighted ? own.weight[row] : 1.0f); });
    }
  }
};

// Row form: a warp takes 16 rows of a tile, a block 32 rows of four tiles.
constexpr int kWideBlockRows = 32, kWideBlockColumns = 4 * kTile;

__device__ __forceinline__ int row_in_wide_block(unsigned thread) {
  return thread / 128 * kFactorRows + wide_row(thread) % kFactorRows;
}
__device__ __forceinline__ int column_in_wide_block(unsigned thread) {
  return thread / 32 % 4 * kTile + wide_column(thread);
}

constexpr int kWideBlocks = 4;  // of an SM

template <bool kWeighted>
__global__ void __launch_bounds__(kWideThreads, kWideBlocks)
    swiglu_rows_kernel(const GateUpInput in, const RowGroups groups, const QuantOutput out) {
  alignas(16) __shared__ WideCodes codes;
  const BlockPosition block(blockIdx.x, out.num_columns, kWideBlockColumns);
  const int64_t first_row = block.row * kWideBlockRows;
  const int first_column = block.column * kWideBlockColumns;
  const RowCounts counts = count_rows(groups, first_row, out.num_rows, kWideBlockRows);
  if (first_column + column_in_wide_block(threadIdx.x) >= out.num_columns) return;  // whole warps
  WideOctets products;
  {
    const int row = threadIdx.x / 128 * kFactorRows;
    codes.copy(in, first_row + row, first_column + column_in_wide_block(threadIdx.x), counts.read - row);
    codes.multiply_all<kWeighted>(counts.read - row, products);
  }
  const unsigned thread = thread_idx_read_here();
  const int row = row_in_wide_block(thread);
  const WideRows rows{out, first_row + row, first_column + column_in_wide_block(thread), counts.written - row};
  float inverse[kRowsPerThread];
  share_inverse(rows.scale(WideMagnitudes(products)), inverse);
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const uint2 low = quantize_octet(products[r][0], inverse[r]), high = quantize_octet(products[r][1], inverse[r]);
    rows.write(r, make_uint4(low.x, low.y, high.x, high.y));
  }
}

struct WideBothStorage {
  WideCodes codes;
  WideColumnScales columns;

  // Once the products are in registers.
  __device__ __forceinline__ TransposedTile& tile() { return reinterpret_cast<TransposedTile&>(codes.gate); }
};

// Both forms: a block takes a tile.
template <bool kWeighted>
__global__ void __launch_bounds__(kWideThreads, kWideBlocks)
    swiglu_both_kernel(const GateUpInput in, const RowGroups groups, const QuantOutput out) {
  extern __shared__ uint4 dynamic_storage[];
  auto& storage = *reinterpret_cast<WideBothStorage*>(dynamic_storage);
  const TilePlace place = tile_of_block(groups, out.num_rows);
  if (place.rows.written == 0) return;  // past the last group
  const int row = threadIdx.x / 32 * kFactorRows, rows_left = place.rows.read - row;
  storage.codes.copy(in, place.first_row + row, place.first_column + wide_column(threadIdx.x), rows_left);
  WideOctets products;
  storage.codes.multiply_all<kWeighted>(rows_left, products);
  write_wide_tile<true>(out, place, products, storage.tile(), storage.columns);
}

}  // namespace dsv3rt
