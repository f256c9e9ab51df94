// RMSNorm with casts by rows and by columns. Columns can be scaled only when 128 rows are normed, and a row is too long
// for one block to hold 128 of them. So two kinds of blocks walk over strips of 128 rows in one kernel: the first norms
// rows, the second, some strips behind, reads them again, out of the L2, and casts their columns.
#pragma once

#include <cuda/atomic>

#include "quant/norm.cuh"
#include "quant/quantize_1x128.cuh"

namespace dsv3rt {

// Rows whose rstd is known, normed again.
template <typename Weight>
class NormedSource {
 public:
  using Params = NormParams;
  using Element = __nv_bfloat16;
  struct Raw {
    Octet<__nv_bfloat16> x;
    float rstd;

    __device__ __forceinline__ void clear() {
      x.clear();
      rstd = 0.0f;
    }
  };

  __device__ __forceinline__ NormedSource(const Params& in, int64_t row, int column) : rstd_(in.rstd + row) {
    const bool summed = in.residual != nullptr;
    stride_ = summed ? in.out.num_columns : in.x_stride;
    first_ = static_cast<const __nv_bfloat16*>(summed ? in.sum : in.x) + row * stride_ + column;
    weight_.clear();
    if (column < in.out.num_columns) weight_.load(static_cast<const Weight*>(in.weight) + column);
  }
  __device__ __forceinline__ void load(Raw& raw, int r) const {
    raw.x.load(first_ + r * stride_);
    raw.rstd = rstd_[r];
  }
  __device__ __forceinline__ Octet<__nv_bfloat16> octet(const Raw& raw) const {
    return norm_octet(raw.x, raw.rstd, weight_);
  }

 private:
  const __nv_bfloat16* first_;
  const float* rstd_;
  int64_t stride_;
  Octet<Weight> weight_;
};

// Blocks come in stages: those for the rows of strip `stage`, then those for the columns of strip `stage - lag`. A
// block for columns waits for rows of blocks before it alone, and blocks start in the order of their numbers (CUB's
// scans rest on that, too): what is waited for is always running or done.
struct NormStages {
  int row_blocks, column_blocks;  // of a stage
  int lag;
  int num_strips;

  DSV3RT_HOST_DEVICE int blocks() const { return row_blocks + column_blocks; }
};

using StripCounter = cuda::atomic_ref<int, cuda::thread_scope_device>;

template <class Shape, typename Weight>
__global__ void __launch_bounds__(kTileThreads, 2) norm_both_kernel(const NormParams params, const NormStages stages) {
  __shared__ float warp_sums[kTileWarps];
  alignas(16) __shared__ TransposedTile tile;
  __shared__ ColumnScales<__nv_bfloat16> columns;
  const int stage = blockIdx.x / stages.blocks(), slot = blockIdx.x % stages.blocks();
  if (slot < stages.row_blocks) {
    if (stage >= stages.num_strips) return;
    const int64_t first_row = stage * int64_t(kTile) + slot * (kTileThreads / Shape::kThreads);
    norm_rows<Shape, Weight>(params, first_row, warp_sums);
    __syncthreads();
    if (threadIdx.x == 0) StripCounter(params.row_blocks_done[stage]).fetch_add(1, cuda::memory_order_release);
    return;
  }
  const int strip = stage - stages.lag;
  if (strip < 0 || strip >= stages.num_strips) return;
  if (threadIdx.x == 0) {
    const StripCounter done(params.row_blocks_done[strip]);
    while (done.load(cuda::memory_order_acquire) < stages.row_blocks) __nanosleep(64);
  }
  __syncthreads();
  const int64_t first_row = strip * int64_t(kTile);
  const int existing = static_cast<int>(min(params.out.num_rows - first_row, int64_t(kTile)));
  const TilePlace place{first_row, (slot - stages.row_blocks) * kTile, {existing, existing}};
  const int column = place.first_column + column_in_tile();
  TileOctets<__nv_bfloat16> octets;
  load_octets(NormedSource<Weight>(params, place.first_row + row_in_tile(), column),
              column < params.out.num_columns ? place.rows_to_read() : 0, octets);
  write_tile_columns<__nv_bfloat16>(params.out, place, octets, tile, columns);
}

}  // namespace dsv3rt
