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

// How many rows the threads of a block share at a time, and in how many goes: two, but one of a sum, whose rows are
// twice the loads. So all of them are under way at once. Threads past the last row may be left over.
template <class Shape, bool kOfSum>
struct RootShape {
  static constexpr int kRowsAtOnce = kTileThreads / Shape::kThreads, kGoes = kOfSum ? 1 : 2;
  static constexpr int kRows = kGoes * kRowsAtOnce;
  using WarpSums = float[kGoes][(kRowsAtOnce + 1) * (Shape::kThreads / 32)];
};

// Roots of the rows from first_row, and their sums with the residual, if there is one.
template <class Shape, bool kOfSum>
__device__ __forceinline__ void find_roots(const NormParams& params, int64_t first_row,
                                           typename RootShape<Shape, kOfSum>::WarpSums& warp_sums) {
  using Part = RowPart<Shape>;
  using Roots = RootShape<Shape, kOfSum>;
  const int row = threadIdx.x / Shape::kThreads;
  Part parts[Roots::kGoes];
#pragma unroll
  for (int go = 0; go < Roots::kGoes; ++go) {
    parts[go] = Part(params, first_row + go * Roots::kRowsAtOnce + row, row < Roots::kRowsAtOnce);
  }
#pragma unroll
  for (int go = 0; go < Roots::kGoes; ++go) load_row(params, parts[go]);
#pragma unroll
  for (int go = 0; go < Roots::kGoes; ++go) {
    const float sum = sum_over_warp(sum_of_squares(parts[go]));
    if (threadIdx.x % 32 == 0) warp_sums[go][threadIdx.x / 32] = sum;
  }
  wait_for_prior_grid();
  __syncthreads();
  if (Part::thread() > 0) return;
#pragma unroll
  for (int go = 0; go < Roots::kGoes; ++go) {
    if (!parts[go].exists()) continue;
    const uint32_t bits = __float_as_uint(rstd_of(params, add_warps<Shape::kThreads>(warp_sums[go])));
    root_bits(params, parts[go].row).store(min(bits, kUnknownRoot - 1), cuda::memory_order_release);
  }
}

struct NormTileStorage {
  TransposedTile tile;
  ColumnScales<__nv_bfloat16> columns;
};

// A tile of a strip. kWhole: all of its rows and columns exist.
template <typename Weight, bool kOfSum>
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
    const int64_t stride = kOfSum ? params_.out.num_columns : params_.x_stride;
    const auto* x = static_cast<const __nv_bfloat16*>(kOfSum ? params_.sum : params_.x) + row() * stride + column_;
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

  // Whole warps call it: eight lanes ask for the roots of the warp's eight rows. Rows that do not exist are zeros, and
  // stay so with a root of zero.
  template <bool kWhole>
  __device__ __forceinline__ void wait_for_roots() {
    wait_for_prior_grid();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows + lane;
    root_ = 0.0f;
    if (lane < kWarpRows && (kWhole || row < place_.rows.read)) {
      constexpr auto order = kOfSum ? cuda::memory_order_acquire : cuda::memory_order_relaxed;
      const RootBits known = root_bits(params_, place_.first_row + row);
      uint32_t bits = known.load(order);
      while (bits == kUnknownRoot) {
        __nanosleep(64);
        bits = known.load(order);
      }
      root_ = __uint_as_float(bits);
    }
    __syncwarp();
  }

  template <bool kWhole>
  __device__ __forceinline__ void norm() {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float rstd = __shfl_sync(~0u, root_, row_in_tile() % kWarpRows + r);
      octets_[r] = norm_octet(octets_[r], rstd, weight_);
    }
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
  static constexpr int kWarpRows = 2 * kRowsPerThread;

  __device__ __forceinline__ int64_t row() const { return place_.first_row + row_in_tile(); }
  // Of this thread's rows, how many exist.
  __device__ __forceinline__ int rows() const { return column_ < params_.out.num_columns ? place_.rows_to_read() : 0; }

  const NormParams& params_;
  TilePlace place_;
  int column_;
  TileOctets<__nv_bfloat16> octets_;
  Octet<Weight> weight_;
  float root_;  // of row `lane` of the warp's
};

template <bool kWhole, bool kOfSum, typename Weight>
__device__ __forceinline__ void cast_tile(NormTile<Weight, kOfSum>& tile, NormTileStorage& storage) {
  tile.template load_weight<kWhole>();
  if (!kOfSum) tile.template load<kWhole>();  // x is there, roots perhaps not yet
  tile.template wait_for_roots<kWhole>();
  if (kOfSum) tile.template load<kWhole>();
  tile.template norm<kWhole>();
  tile.template write<kWhole>(storage);
}

template <class Shape, typename Weight, bool kOfSum>
__global__ void __launch_bounds__(kTileThreads, 2)
    norm_both_kernel(const __grid_constant__ NormParams params, const __grid_constant__ NormStages stages) {
  using Roots = RootShape<Shape, kOfSum>;
  __shared__ typename Roots::WarpSums warp_sums;
  alignas(16) __shared__ NormTileStorage storage;
  const int stage = blockIdx.y, slot = blockIdx.x;
  if (slot < stages.row_blocks) {
    if (stage >= stages.num_strips) return;
    return find_roots<Shape, kOfSum>(params, stage * int64_t(kTile) + slot * Roots::kRows, warp_sums);
  }
  const int strip = stage - stages.lag;
  if (strip < 0) return;
  NormTile<Weight, kOfSum> tile(params, strip, slot - stages.row_blocks);
  if (tile.is_whole()) {
    cast_tile<true>(tile, storage);
  } else {
    cast_tile<false>(tile, storage);
  }
}

}  // namespace dsv3rt
