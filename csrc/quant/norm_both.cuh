// RMSNorm with casts by rows and by columns. Columns can be scaled only when 128 rows have their roots, and a row is
// too long for one block to hold 128 of them. So two kinds of blocks walk over strips of 128 rows in one kernel: the
// first finds the roots of rows, the second, some strips behind, reads tiles of the strip again, out of the L2, norms
// and casts them.
#pragma once

#include <cuda/atomic>

#include "quant/norm.cuh"

namespace dsv3rt {

// Blocks come in stages: those for the rows of strip `stage`, then those for the tiles of strip `stage - lag`. A block
// for a tile waits for rows of blocks before it alone, and blocks start in the order of their numbers (CUB's scans rest
// on that, too): what is waited for is always running or done.
struct NormStages {
  int row_blocks, tile_blocks;  // of a stage
  int lag;
  int num_strips;

  DSV3RT_HOST_DEVICE int blocks() const { return row_blocks + tile_blocks; }
};

using StripCounter = cuda::atomic_ref<int, cuda::thread_scope_device>;

// How many rows a block finds the roots of; threads past the last may be left over.
template <class Shape>
constexpr int kRootRows = kTileThreads / Shape::kThreads;

// The rows that the threads of a block share, from first_row: their sums with the residual, if there is one, and roots.
template <class Shape>
__device__ __forceinline__ void find_roots(const NormParams& params, int64_t first_row, float* warp_sums) {
  RowPart<Shape> part;
  const int row = threadIdx.x / Shape::kThreads;
  part.row = first_row + row;
  part.exists = row < kRootRows<Shape> && part.row < params.out.num_rows;
  load_row(params, part);
  const float rstd = row_rstd(params, part, warp_sums);
  if (part.exists && part.thread() == 0) params.rstd[part.row] = rstd;
}

struct NormTileStorage {
  TransposedTile tile;
  ColumnScales<__nv_bfloat16> columns;
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
  __device__ __forceinline__ void norm() {
    Octet<Weight> weight;
    weight.clear();
    if (kWhole || rows() > 0) weight.load(static_cast<const Weight*>(params_.weight) + column_);
    auto* y = static_cast<__nv_bfloat16*>(params_.y) + row() * params_.out.num_columns + column_;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float rstd = kWhole || r < rows() ? __ldcg(params_.rstd + row() + r) : 0.0f;
      octets_[r] = norm_octet(octets_[r], rstd, weight);
      if (params_.y != nullptr && (kWhole || r < rows())) {
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
};

__device__ __forceinline__ void wait_for_rows(int& row_blocks_done, int row_blocks) {
  wait_for_prior_grid();
  if (threadIdx.x == 0) {
    const StripCounter done(row_blocks_done);
    while (done.load(cuda::memory_order_acquire) < row_blocks) __nanosleep(64);
  }
  __syncthreads();
}

template <bool kWhole, typename Weight>
__device__ __forceinline__ void cast_tile(const NormParams& params, NormTile<Weight>& tile, int& row_blocks_done,
                                          int row_blocks, NormTileStorage& storage) {
  if (params.residual == nullptr) tile.template load<kWhole>();  // x is there, roots perhaps not yet
  wait_for_rows(row_blocks_done, row_blocks);
  if (params.residual != nullptr) tile.template load<kWhole>();
  tile.template norm<kWhole>();
  tile.template write<kWhole>(storage);
}

template <class Shape, typename Weight>
__global__ void __launch_bounds__(kTileThreads, 2)
    norm_both_kernel(const __grid_constant__ NormParams params, const __grid_constant__ NormStages stages) {
  __shared__ float warp_sums[(kRootRows<Shape> + 1) * ceil_div(Shape::kThreads, 32)];
  alignas(16) __shared__ NormTileStorage storage;
  const int stage = blockIdx.x / stages.blocks(), slot = blockIdx.x % stages.blocks();
  if (slot < stages.row_blocks) {
    if (stage >= stages.num_strips) return;
    const int64_t first_row = stage * int64_t(kTile) + slot * kRootRows<Shape>;
    find_roots<Shape>(params, first_row, warp_sums);
    wait_for_prior_grid();
    __syncthreads();
    if (threadIdx.x == 0) StripCounter(params.row_blocks_done[stage]).fetch_add(1, cuda::memory_order_release);
    return;
  }
  const int strip = stage - stages.lag;
  if (strip < 0 || strip >= stages.num_strips) return;
  NormTile<Weight> tile(params, strip, slot - stages.row_blocks);
  if (tile.is_whole()) {
    cast_tile<true>(params, tile, params.row_blocks_done[strip], stages.row_blocks, storage);
  } else {
    cast_tile<false>(params, tile, params.row_blocks_done[strip], stages.row_blocks, storage);
  }
}

}  // namespace dsv3rt
