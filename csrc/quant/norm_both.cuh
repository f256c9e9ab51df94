// RMSNorm with casts by rows and by columns. Columns can be scaled only when 128 rows are normed, and the CTAs of a
// cluster keep so many: each the same few tiles of 128 columns, all but one in shared memory, the last in registers.
// Every number is read once. While a strip of 128 rows is cast, tile by tile, the next one arrives in its place.
#pragma once

#include "hopper/memory.cuh"
#include "hopper/shared.cuh"
#include "quant/norm.cuh"

namespace dsv3rt {

struct NormStrips {
  int num_strips;
  int num_clusters;
  TileGroups tiles;  // of a CTA, and how many CTAs a cluster has

  // Of tiles in shared memory, where each thread reads what it wrote itself.
  static constexpr int kMostKeptBytes = (TileGroups::kMostTilesKept - 1) * kTile * kTile * 2;
};

static_assert(kMaxNormBothColumns == TileGroups::kMostGroups * TileGroups::kMostTilesKept * kTile);

struct NormStripStorage {
  TransposedTile transposed;
  ColumnScales<WideBFloat16> columns;
  alignas(16) float squares[2][TileGroups::kMostGroups][kTile];  // of each CTA's columns; strips take turns
  alignas(16) float rstd[kTile];
};

template <typename Weight>
class NormStripWalker {
 public:
  __device__ __forceinline__ NormStripWalker(const NormParams& params, const NormStrips& strips, uint4* kept,
                                             NormStripStorage& storage)
      : params_(params),
        strips_(strips),
        kept_(kept + threadIdx.x),
        storage_(storage),
        rank_(blockIdx.x % strips.tiles.count),
        last_(strips.tiles.tiles - 1) {}

  __device__ __forceinline__ void walk() {
    int strip = blockIdx.x / strips_.tiles.count;
    for (int tile = 0; tile < last_; ++tile) fetch(strip, tile);
    fetch_last(strip);
    cluster_sync();  // every CTA has started and can be written to
#pragma unroll 1
    for (int turn = 0; strip < strips_.num_strips; strip += strips_.num_clusters, turn ^= 1) {
      add_squares(strip, turn);
      find_rstd(strip, turn);
#pragma unroll 1
      for (int tile = 0; tile <= last_; ++tile) {
        TileOctets<__nv_bfloat16> octets;
        if (tile < last_) {
#pragma unroll
          for (int r = 0; r < kRowsPerThread; ++r) octets[r].words = slot(tile, r);
          fetch(strip + strips_.num_clusters, tile);
        } else {
#pragma unroll
          for (int r = 0; r < kRowsPerThread; ++r) octets[r] = in_registers_[r];
          fetch_last(strip + strips_.num_clusters);
        }
        cast(strip, tile, octets);
      }
    }
    copy_async_wait<0>();
  }

 private:
  __device__ __forceinline__ uint4& slot(int tile, int r) const {
    return kept_[(tile * kRowsPerThread + r) * kTileThreads];
  }
  __device__ __forceinline__ int64_t row_of(int strip) const { return int64_t(strip) * kTile + row_in_tile(); }
  __device__ __forceinline__ int column_of(int tile) const {
    return (rank_ * strips_.tiles.tiles + tile) * kTile + column_in_tile();
  }
  // Of this thread's rows of a tile, how many exist.
  __device__ __forceinline__ int rows_left(int strip, int tile) const {
    const bool exists = strip < strips_.num_strips && column_of(tile) < params_.out.num_columns;
    return exists ? static_cast<int>(min(params_.out.num_rows - row_of(strip), int64_t(kRowsPerThread))) : 0;
  }
  __device__ __forceinline__ const __nv_bfloat16* input(const void* base, int64_t stride, int strip, int tile) const {
    return static_cast<const __nv_bfloat16*>(base) + row_of(strip) * stride + column_of(tile);
  }

  // A tile of x to shared memory, a group of copies; zeros where there is nothing.
  __device__ __forceinline__ void fetch(int strip, int tile) const {
    const int rows = rows_left(strip, tile);
    const auto* x = input(params_.x, params_.x_stride, strip, tile);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      copy_async<16>(&slot(tile, r), r < rows ? x + r * params_.x_stride : params_.x, r < rows);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ void load(const void* base, int64_t stride, int strip, int tile,
                                       TileOctets<__nv_bfloat16>& octets) const {
    const int rows = rows_left(strip, tile);
    const auto* x = input(base, stride, strip, tile);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      octets[r].clear();
      if (r < rows) octets[r].load(x + r * stride);
    }
  }
  __device__ __forceinline__ void fetch_last(int strip) {
    load(params_.x, params_.x_stride, strip, last_, in_registers_);
  }

  // Adds the residual's tile and writes the sum.
  __device__ __forceinline__ void add_residual(int strip, int tile, const TileOctets<__nv_bfloat16>& residual,
                                               TileOctets<__nv_bfloat16>& octets) const {
    const int rows = rows_left(strip, tile);
    auto* sum = static_cast<__nv_bfloat16*>(params_.sum) + row_of(strip) * params_.out.num_columns + column_of(tile);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      octets[r] = add_octets(octets[r], residual[r]);
      if (r < rows) *reinterpret_cast<uint4*>(sum + r * int64_t(params_.out.num_columns)) = octets[r].words;
    }
  }

  __device__ __forceinline__ float squares_of(const TileOctets<__nv_bfloat16>& octets) const {
    float squares[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) squares[r] = sum_of_squares(octets[r]);
    return sum_over_tile(squares);
  }

  // The squares of this CTA's columns, to every CTA of the cluster.
  __device__ __forceinline__ void add_squares(int strip, int turn) {
    const bool summed = params_.residual != nullptr;
    TileOctets<__nv_bfloat16> residual;
    if (summed) load(params_.residual, params_.residual_stride, strip, 0, residual);
    float sum = 0.0f;
#pragma unroll 1
    for (int tile = 0; tile < last_; ++tile) {
      wait_for(last_ - 1 - tile);
      TileOctets<__nv_bfloat16> octets, next;
      if (summed) load(params_.residual, params_.residual_stride, strip, tile + 1, next);
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) octets[r].words = slot(tile, r);
      if (summed) {
        add_residual(strip, tile, residual, octets);
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          slot(tile, r) = octets[r].words;
          residual[r] = next[r];
        }
      }
      sum = __fadd_rn(sum, squares_of(octets));
    }
    if (summed) add_residual(strip, last_, residual, in_registers_);
    sum = __fadd_rn(sum, squares_of(in_registers_));
    float rows[kRowsPerThread];  // lanes 4r .. 4r + 4 of sixteen have the sum of row r
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) rows[r] = __shfl_sync(~0u, sum, 4 * r, 16);
    const int peer = threadIdx.x % 16;
    if (peer < strips_.tiles.count) {
      store_cluster_quad(smem_address(&storage_.squares[turn][rank_][row_in_tile()]), peer, rows);
    }
  }

  __device__ __forceinline__ void find_rstd(int strip, int turn) {
    cluster_sync();
    if (threadIdx.x < kTile) {
      float sums[TileGroups::kMostGroups];
#pragma unroll
      for (int i = 0; i < TileGroups::kMostGroups; ++i) {
        sums[i] = i < strips_.tiles.count ? storage_.squares[turn][i][threadIdx.x] : 0.0f;
      }
#pragma unroll
      for (int half = TileGroups::kMostGroups / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) sums[i] = __fadd_rn(sums[i], sums[i + half]);
      }
      const float rstd = rstd_of(params_, sums[0]);
      storage_.rstd[threadIdx.x] = rstd;
      const int64_t row = int64_t(strip) * kTile + threadIdx.x;
      if (rank_ == 0 && row < params_.out.num_rows) params_.rstd[row] = rstd;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void cast(int strip, int tile, const TileOctets<__nv_bfloat16>& octets) const {
    const int first_column = column_of(tile) - column_in_tile();
    const int existing = static_cast<int>(min(params_.out.num_rows - int64_t(strip) * kTile, int64_t(kTile)));
    if (existing == kTile && first_column + kTile <= params_.out.num_columns) {
      cast<true>(strip, tile, existing, octets);
    } else if (first_column < params_.out.num_columns) {
      cast<false>(strip, tile, existing, octets);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void cast(int strip, int tile, int existing,
                                       const TileOctets<__nv_bfloat16>& octets) const {
    const int column = column_of(tile), rows = kWhole ? kRowsPerThread : rows_left(strip, tile);
    Octet<Weight> weight;
    weight.clear();
    if (kWhole || rows > 0) weight.load(static_cast<const Weight*>(params_.weight) + column);
    const float4 rstd = *reinterpret_cast<const float4*>(storage_.rstd + row_in_tile());
    const TileOctets<WideBFloat16> normed = {
        Octet<WideBFloat16>(norm_octet(octets[0], rstd.x, weight)),
        Octet<WideBFloat16>(norm_octet(octets[1], rstd.y, weight)),
        Octet<WideBFloat16>(norm_octet(octets[2], rstd.z, weight)),
        Octet<WideBFloat16>(norm_octet(octets[3], rstd.w, weight)),
    };
    if (params_.y != nullptr) {
      auto* y = static_cast<__nv_bfloat16*>(params_.y) + row_of(strip) * params_.out.num_columns + column;
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        if (r < rows) *reinterpret_cast<uint4*>(y + r * int64_t(params_.out.num_columns)) = normed[r].words;
      }
    }
    const TilePlace place{int64_t(strip) * kTile, column - column_in_tile(), {existing, existing}};
    write_tile<WideBFloat16, kWhole>(params_.out, place, normed, storage_.transposed, storage_.columns);
  }

  // Until so many of the groups of copies, or fewer, are under way.
  static __device__ __forceinline__ void wait_for(int pending) {
    static_assert(TileGroups::kMostTilesKept == 7);
    switch (pending) {
      case 5: return copy_async_wait<5>();
      case 4: return copy_async_wait<4>();
      case 3: return copy_async_wait<3>();
      case 2: return copy_async_wait<2>();
      case 1: return copy_async_wait<1>();
      default: return copy_async_wait<0>();
    }
  }

  const NormParams& params_;
  const NormStrips& strips_;
  uint4* kept_;
  NormStripStorage& storage_;
  int rank_, last_;
  TileOctets<__nv_bfloat16> in_registers_;  // of the last tile
};

template <typename Weight>
__global__ void __launch_bounds__(kTileThreads, 1)
    norm_both_kernel(const __grid_constant__ NormParams params, const __grid_constant__ NormStrips strips) {
  extern __shared__ uint4 kept_tiles[];
  __shared__ NormStripStorage storage;
  NormStripWalker<Weight>(params, strips, kept_tiles, storage).walk();
  cluster_sync();  // a CTA's memory outlives what others write to it
}

}  // namespace dsv3rt
