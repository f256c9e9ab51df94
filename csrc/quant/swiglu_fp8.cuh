// SwiGLU of FP8 with its cast: sixteen columns of four rows a thread; F a multiple of 128.
#pragma once

#include "hopper/memory.cuh"
#include "quant/swiglu.cuh"
#include "quant/wide_tile.cuh"

namespace dsv3rt {

// Scales and row weights of 16 rows, where their warp left them. Eight lanes share the factors of their four rows.
struct WarpFactors {
  float gate_scale[16], up_scale[16], weight[16];
};

__device__ __forceinline__ int row_in_warp(unsigned thread) { return thread % 32 / 8 * kRowsPerThread; }

// Four rows of sixteen gates and ups, as loaded, and their factors.
template <bool kWeighted>
class WideGateUp {
 public:
  __device__ __forceinline__ explicit WideGateUp(WarpFactors& factors) : factors_(factors) {}

  // All loads are in flight before the first use. Zeros past `rows_left`.
  __device__ __forceinline__ void load(const GateUpInput& in, int64_t row, int column, int rows_left) {
    copy_factors(in, row, column / kTile, rows_left);
    const auto* gate = static_cast<const uint8_t*>(in.data) + row * in.stride + column;
    if (rows_left >= kRowsPerThread) {  // without a condition each, loads follow one another
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r, gate += in.stride) load_row(r, gate, in.hidden);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r, gate += in.stride) {
      gates_[r] = ups_[r] = make_uint4(0, 0, 0, 0);
      if (r < rows_left) load_row(r, gate, in.hidden);
    }
  }

  // Whole warps call it.
  __device__ __forceinline__ void multiply_all(WideOctets& products) const {
    copy_async_wait<0>();
    __syncwarp();
    const float scale = factors_.gate_scale[row_in_warp(threadIdx.x) + threadIdx.x % kRowsPerThread];
    if (__all_sync(~0u, scale_bounds_gates(scale))) {
      multiply_as<true>(products);
    } else {
      multiply_as<false>(products);
    }
  }

 private:
  // Lanes 0 to 3 of eight copy the scales of the gates and the row weights, the others the scales of the ups.
  __device__ __forceinline__ void copy_factors(const GateUpInput& in, int64_t row, int tile, int rows_left) {
    const int lane_row = threadIdx.x % kRowsPerThread, target = row_in_warp(threadIdx.x) + lane_row;
    const bool valid = lane_row < rows_left, of_gate = threadIdx.x % 8 < kRowsPerThread;
    const float* scale = in.scale + (of_gate ? tile : in.hidden / kTile + tile) * in.scale_stride + row + lane_row;
    copy_async<4>(of_gate ? &factors_.gate_scale[target] : &factors_.up_scale[target], scale, valid);
    if (kWeighted && of_gate) copy_async<4>(&factors_.weight[target], in.weight + row + lane_row, valid);
    copy_async_commit();
  }

  __device__ __forceinline__ void load_row(int r, const uint8_t* gate, int hidden) {
    gates_[r] = *reinterpret_cast<const uint4*>(gate);
    ups_[r] = *reinterpret_cast<const uint4*>(gate + hidden);
  }

  template <bool kBounded>
  __device__ __forceinline__ void multiply_as(WideOctets& products) const {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int row = row_in_warp(threadIdx.x) + r;
      const uint4 &gate = gates_[r], &up = ups_[r];
      const float gate_scale = factors_.gate_scale[row], up_scale = factors_.up_scale[row];
      const float weight = kWeighted ? factors_.weight[row] : 1.0f;
      GateUp<__nv_fp8_e4m3> in;
      in.set(make_uint2(gate.x, gate.y), make_uint2(up.x, up.y), gate_scale, up_scale);
      products[r][0] = multiply<kBounded, kWeighted>(in, weight);
      in.set(make_uint2(gate.z, gate.w), make_uint2(up.z, up.w), gate_scale, up_scale);
      products[r][1] = multiply<kBounded, kWeighted>(in, weight);
    }
  }

  uint4 gates_[kRowsPerThread], ups_[kRowsPerThread];
  WarpFactors& factors_;
};

// Row form: a warp takes 16 rows of a tile, a block 32 rows of four tiles.
constexpr int kWideBlockRows = 32, kWideBlockColumns = 4 * kTile;

__device__ __forceinline__ int row_in_wide_block(unsigned thread) {
  return thread / 128 * 16 + thread % 32 / 8 * kRowsPerThread;
}
__device__ __forceinline__ int column_in_wide_block(unsigned thread) {
  return thread / 32 % 4 * kTile + wide_column(thread);
}

template <bool kWeighted>
__global__ void __launch_bounds__(kWideThreads, 3)
    swiglu_rows_kernel(const GateUpInput in, const RowGroups groups, const QuantOutput out) {
  __shared__ WarpFactors factors[kWideWarps];
  const BlockPosition block(blockIdx.x, out.num_columns, kWideBlockColumns);
  const int64_t first_row = block.row * kWideBlockRows;
  const int first_column = block.column * kWideBlockColumns;
  const RowCounts counts = count_rows(groups, first_row, out.num_rows, kWideBlockRows);
  if (first_column + column_in_wide_block(threadIdx.x) >= out.num_columns) return;  // whole warps
  WideOctets products;
  {
    const int row = row_in_wide_block(threadIdx.x), column = first_column + column_in_wide_block(threadIdx.x);
    WideGateUp<kWeighted> gate_up(factors[threadIdx.x / 32]);
    gate_up.load(in, first_row + row, column, counts.read - row);
    gate_up.multiply_all(products);
  }
  const unsigned thread = thread_idx_read_here();
  const int row = row_in_wide_block(thread);
  const WideRows<false> rows{out, first_row + row, first_column + column_in_wide_block(thread), counts.written - row};
  float inverse[kRowsPerThread];
  rows.scale(products, inverse);
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const uint2 low = quantize_octet(products[r][0], inverse[r]), high = quantize_octet(products[r][1], inverse[r]);
    rows.write(r, make_uint4(low.x, low.y, high.x, high.y));
  }
}

struct WideBothStorage {
  TransposedTile tile;
  WideColumnScales columns;
  WarpFactors factors[kWideWarps];
};

template <bool kWeighted, bool kWhole>
__device__ __forceinline__ void cast_wide_tile(const GateUpInput& in, const QuantOutput& out, const TilePlace& place,
                                               WideBothStorage& storage) {
  const int column = place.first_column + wide_column(threadIdx.x);
  const int rows_left = kWhole ? kRowsPerThread : place.rows.read - wide_row(threadIdx.x);
  WideGateUp<kWeighted> gate_up(storage.factors[threadIdx.x / 32]);
  gate_up.load(in, place.first_row + wide_row(threadIdx.x), column, rows_left);
  WideOctets products;
  gate_up.multiply_all(products);
  write_wide_tile<true, kWhole>(out, place, products, storage.tile, storage.columns);
}

// Both forms: a block takes a tile.
template <bool kWeighted>
__global__ void __launch_bounds__(kWideThreads, 3)
    swiglu_both_kernel(const GateUpInput in, const RowGroups groups, const QuantOutput out) {
  alignas(16) __shared__ WideBothStorage storage;
  const TilePlace place = tile_of_block(groups, out.num_rows, out.num_columns);
  if (place.rows.written == 0) return;  // past the last group
  if (place.is_whole(out.num_columns)) {
    cast_wide_tile<kWeighted, true>(in, out, place, storage);
  } else {
    cast_wide_tile<kWeighted, false>(in, out, place, storage);
  }
}

}  // namespace dsv3rt
