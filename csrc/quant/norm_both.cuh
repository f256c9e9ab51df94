// RMSNorm with casts by rows and by columns. Columns can be scaled only when 128 rows have their roots, and a row is
// too long for one block to hold 128 of them. So two kinds of blocks walk over strips of 128 rows in one kernel: the
// first finds the roots of rows, the second, some strips behind, reads tiles of the strip again, out of the L2, norms
// and casts them.
#pragma once

#include <cuda/atomic>

#include "hopper/barrier.cuh"
#include "quant/norm.cuh"

namespace dsv3rt {

// Blocks come in stages: those for the rows of strip `stage`, then those for the tiles of strip `stage - lag`; a stage
// is a row of the grid. A block for a tile waits for rows of blocks before it alone, and blocks start in the order of
// their numbers (CUB's scans rest on that, too): what is waited for is always running or done.
struct NormStages {
  int row_blocks;  // of a stage; tile blocks follow
  int lag;
  int num_strips;
};

// What stands for the root of a row until it is known: a NaN that arithmetic does not give.
constexpr uint32_t kUnknownRoot = ~0u;
using RootBits = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;

__device__ __forceinline__ RootBits root_bits(const NormParams& params, int64_t row) {
  return RootBits(reinterpret_cast<uint32_t*>(params.rstd)[row]);
}

constexpr int kForgetThreads = 256;

// Before `norm_both_kernel`, which starts beside it.
__global__ void __launch_bounds__(kForgetThreads) forget_roots_kernel(const __grid_constant__ NormParams params) {
  let_next_grid_start();
  const int64_t row = int64_t(blockIdx.x) * kForgetThreads + threadIdx.x;
  if (row < params.out.num_rows) params.rstd[row] = __uint_as_float(kUnknownRoot);
}

// How many rows the threads of a block share at a time, and in two goes. Threads past the last row may be left over.
template <class Shape>
struct RootShape {
  static constexpr int kRowsAtOnce = kTileThreads / Shape::kThreads;
  static constexpr int kRows = 2 * kRowsAtOnce;
  using WarpSums = float[2][(kRowsAtOnce + 1) * (Shape::kThreads / 32)];
};

// Roots of the rows from first_row, and their sums with the residual, if there is one.
template <class Shape>
__device__ __forceinline__ void find_roots(const NormParams& params, int64_t first_row,
                                           typename RootShape<Shape>::WarpSums& warp_sums) {
  using Roots = RootShape<Shape>;
  const int row = threadIdx.x / Shape::kThreads;
  RowPart<Shape> parts[] = {
      {params, first_row + row, row < Roots::kRowsAtOnce},
      {params, first_row + Roots::kRowsAtOnce + row, row < Roots::kRowsAtOnce},
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) load_row(params, parts[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = sum_over_warp(sum_of_squares(parts[i]));
    if (threadIdx.x % 32 == 0) warp_sums[i][threadIdx.x / 32] = sum;
  }
  wait_for_prior_grid();
  __syncthreads();
  if (parts[0].thread() > 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!parts[i].exists()) continue;
    const uint32_t bits = __float_as_uint(rstd_of(params, add_warps<Shape::kThreads>(warp_sums[i])));
    root_bits(params, parts[i].row).store(min(bits, kUnknownRoot - 1), cuda::memory_order_release);
  }
}

struct NormTileStorage {
  TransposedTile tile;
  ColumnScales<__nv_bfloat16> columns;
  alignas(16) float rstd[kTile];
};

// A tile of a strip. kWhole: all of its rows and columns exist.
template <typename Weight>
class NormTile {
 public:
  __device__ __forceinline__ NormTile(const NormParams& params, int strip, int column_tile)
      : params_(params),
        place_{int64_t(strip) * kTile, column_tile * kTile, {}},
        column_(column_tile * kTile + column_in_tile()) {
    const int existing = static_cast<int>(min(params.out.num_rows - place_.first_row, int64_t(kTile)));
    place_.rows = {existing, existing};
  }

  __device__ __forceinline__ bool is_whole() const {
    return place_.rows.read == kTile && place_.first_column + kTile <= params_.out.num_columns;
  }

  template <bool kWhole>
  __device__ __forceinline__ void load() {
    const bool summed = params_.residual != nullptr;
    const int64_t stride = summed ? params_.out.num_columns : params_.x_stride;
    const auto* x = static_cast<const __nv_bfloat16*>(summed ? params_.sum : params_.x) + row() * stride + column_;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      octets_[r].clear();
      if (kWhole || r < rows()) octets_[r].load(x + r * stride);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void load_weight() {
    weight_.clear();
    if (kWhole || rows() > 0) weight_.load(static_cast<const Weight*>(params_.weight) + column_);
  }

  // Every thread of the block calls it. Rows that do not exist are zeros, and stay so with a root of zero.
  template <bool kWhole>
  __device__ __forceinline__ void wait_for_roots(NormTileStorage& storage) const {
    wait_for_prior_grid();
    if (threadIdx.x < place_.rows.read) {
      const RootBits root = root_bits(params_, place_.first_row + threadIdx.x);
      uint32_t bits = root.load(cuda::memory_order_acquire);
      while (bits == kUnknownRoot) {
        __nanosleep(64);
        bits = root.load(cuda::memory_order_acquire);
      }
      storage.rstd[threadIdx.x] = __uint_as_float(bits);
    } else if (!kWhole && threadIdx.x < kTile) {
      storage.rstd[threadIdx.x] = 0.0f;
    }
    __syncthreads();
  }

  template <bool kWhole>
  __device__ __forceinline__ void norm(const NormTileStorage& storage) {
    const float4 rstd = *reinterpret_cast<const float4*>(storage.rstd + row_in_tile());
    octets_[0] = norm_octet(octets_[0], rstd.x, weight_);
    octets_[1] = norm_octet(octets_[1], rstd.y, weight_);
    octets_[2] = norm_octet(octets_[2], rstd.z, weight_);
    octets_[3] = norm_octet(octets_[3], rstd.w, weight_);
    if (params_.y == nullptr) return;
    auto* y = static_cast<__nv_bfloat16*>(params_.y) + row() * params_.out.num_columns + column_;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      if (kWhole || r < rows()) {
        *reinterpret_cast<uint4*>(y + r * int64_t(params_.out.num_columns)) = octets_[r].words;
      }
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void write(NormTileStorage& storage) const {
    write_tile<__nv_bfloat16, kWhole>(params_.out, place_, octets_, storage.tile, storage.columns);
  }

 private:
  __device__ __forceinline__ int64_t row() const { return place_.first_row + row_in_tile(); }
  // Of this thread's rows, how many exist.
  __device__ __forceinline__ int rows() const { return column_ < params_.out.num_columns ? place_.rows_to_read() : 0; }

  const NormParams& params_;
  TilePlace place_;
  int column_;
  TileOctets<__nv_bfloat16> octets_;
  Octet<Weight> weight_;
};

template <bool kWhole, typename Weight>
__device__ __forceinline__ void cast_tile(const NormParams& params, NormTile<Weight>& tile, NormTileStorage& storage) {
  tile.template load_weight<kWhole>();
  if (params.residual == nullptr) tile.template load<kWhole>();  // x is there, roots perhaps not yet
  tile.template wait_for_roots<kWhole>(storage);
  if (params.residual != nullptr) tile.template load<kWhole>();
  tile.template norm<kWhole>(storage);
  tile.template write<kWhole>(storage);
}

template <class Shape, typename Weight>
__global__ void __launch_bounds__(kTileThreads, 2)
    norm_both_kernel(const __grid_constant__ NormParams params, const __grid_constant__ NormStages stages) {
  __shared__ typename RootShape<Shape>::WarpSums warp_sums;
  alignas(16) __shared__ NormTileStorage storage;
  const int stage = blockIdx.y, slot = blockIdx.x;
  if (slot < stages.row_blocks) {
    if (stage >= stages.num_strips) return;
    return find_roots<Shape>(params, stage * int64_t(kTile) + slot * RootShape<Shape>::kRows, warp_sums);
  }
  const int strip = stage - stages.lag;
  if (strip < 0) return;
  NormTile<Weight> tile(params, strip, slot - stages.row_blocks);
  if (tile.is_whole()) {
    cast_tile<true>(params, tile, storage);
  } else {
    cast_tile<false>(params, tile, storage);
  }
}

}  // namespace dsv3rt
