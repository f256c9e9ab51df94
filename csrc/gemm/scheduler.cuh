// Which tiles a block computes, and in which order. Every role of a block walks the same list.
#pragma once

#include "gemm/config.cuh"

namespace dsv3rt {

// Tiles are walked in bands of `band` row blocks, down the band first, so that the tiles in flight share operands in
// L2.
struct TileRaster {
  int band;
};

struct Tile {
  int m, n;          // first row of A and D, first column of D
  int row_end;       // rows from here on are not stored
  int b_row;         // first row of B
  int group;
  int k_block_begin, num_k_blocks;
  int step;          // of a spread last wave, at which this part of a tile begins; -1 in whole waves
};

// A part of a tile of a spread last wave: its place in the order in which they add to D, their number, and where it is
// counted how many have.
struct TilePart {
  int place, count, slot;
};

// Fills prefix[g] with the number of row blocks of all groups before g; called by one whole warp.
template <typename C>
__device__ __forceinline__ void scan_group_blocks(const GemmParams& params, int* prefix) {
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int first = 0; first < params.num_groups; first += 32) {
    const int group = first + lane;
    int sum = group < params.num_groups ? ceil_div(params.counts[group], C::kBlockM) : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += below;
    }
    if (group < params.num_groups) prefix[group + 1] = total + sum;
    total += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) prefix[0] = 0;
}

template <typename C>
class TileScheduler {
 public:
  __device__ __forceinline__ TileScheduler(const GemmParams& params, const TileRaster& raster, const int* block_prefix)
      : params_(params), prefix_(block_prefix), band_(raster.band) {
    const uint32_t rank = C::kShare == Share::kNone ? 0 : cluster_cta_rank();
    m_step_ = C::kShare == Share::kB ? 2 : 1;
    n_step_ = C::kShare == Share::kA ? 2 : 1;
    m_rank_ = C::kShare == Share::kB ? rank : 0;
    n_rank_ = C::kShare == Share::kA ? rank : 0;
    const int m_blocks =
        C::kGrouping == Grouping::kRows ? block_prefix[params.num_groups] : ceil_div(params.m, C::kBlockM);
    m_units_ = ceil_div(m_blocks, m_step_);
    n_units_ = ceil_div(ceil_div(params.n, C::kBlockN), n_step_);
    unit_ = blockIdx.x / C::kClusterSize;
    half_ = C::kShare == Share::kDepth ? rank : 0;
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    const int units = m_units_ * n_units_;
    const int num_clusters = gridDim.x / C::kClusterSize;
    if constexpr (C::kGrouping == Grouping::kDepth) {
      for (; unit_ < units * params_.num_groups; unit_ += num_clusters) {
        tile.group = unit_ / units;
        const int count = params_.counts[tile.group];
        if (C::kOutput == GemmOutput::kFloat32Add && count == 0) continue;  // else its result is zeros
        tile.k_block_begin = params_.offsets[tile.group] / kBlockK;
        tile.num_k_blocks = ceil_div(count, kBlockK);
        place(unit_ % units, tile);
        unit_ += num_clusters;
        return true;
      }
      return false;
    } else {
      if constexpr (C::kSpread) {
        if (unit_ >= units / num_clusters * num_clusters) return next_of_spread(tile);
        tile.step = -1;
      }
      if (unit_ >= units) return false;
      tile.group = 0;
      tile.k_block_begin = 0;
      tile.num_k_blocks = ceil_div(params_.k, kBlockK);
      if constexpr (C::kShare == Share::kDepth) {
        const int first_half = ceil_div(tile.num_k_blocks, 2);
        tile.k_block_begin = half_ * first_half;
        tile.num_k_blocks = half_ == 0 ? first_half : tile.num_k_blocks - first_half;
      }
      place(unit_, tile);
      unit_ += num_clusters;
      return true;
    }
  }

  __device__ __forceinline__ TilePart part_of(const Tile& tile) const {
    const SpreadWave wave = spread_wave();
    const int index = tile.step / wave.depth;
    const int first_cluster = (wave.total - (index + 1) * wave.depth) / wave.span;
    return {int(blockIdx.x / C::kClusterSize) - first_cluster,
            (wave.total - 1 - index * wave.depth) / wave.span - first_cluster + 1,
            int(index * C::kClusterSize + blockIdx.x % C::kClusterSize) * 16};
  }

 private:
  struct SpreadWave {
    int whole, depth, total, span;
  };

  __device__ __forceinline__ SpreadWave spread_wave() const {
    constexpr int kMaxParts = 4;
    const int units = m_units_ * n_units_, num_clusters = gridDim.x / C::kClusterSize;
    const int whole = units / num_clusters * num_clusters, depth = ceil_div(params_.k, kBlockK);
    const int total = (units - whole) * depth;
    return {whole, depth, total, max(ceil_div(total, num_clusters), ceil_div(depth, kMaxParts))};
  }

  // Cluster c has the steps [total - (c + 1) span, total - c span) of all tiles of the last wave put end to end, first
  // to last. Of a tile's parts the deepest is added first: it belongs to the lowest cluster, which starts with it. So
  // no cluster waits for a later one.
  __device__ __forceinline__ bool next_of_spread(Tile& tile) {
    const SpreadWave wave = spread_wave();
    const int end = wave.total - int(blockIdx.x / C::kClusterSize) * wave.span;
    // Behind the whole units unit_ counts steps.
    const int first_step = wave.whole + gridDim.x / C::kClusterSize;
    const int step = unit_ < first_step ? max(end - wave.span, 0) : unit_ - first_step;
    if (step >= end) return false;
    tile.group = 0;
    tile.step = step;
    tile.k_block_begin = step % wave.depth;
    tile.num_k_blocks = min(wave.depth - tile.k_block_begin, end - step);
    place(wave.whole + step / wave.depth, tile);
    unit_ = first_step + step + tile.num_k_blocks;
    return true;
  }

  __device__ __forceinline__ void place(int unit, Tile& tile) const {
    const int band_units = band_ * n_units_, band = unit / band_units, inside = unit % band_units;
    const int height = min(band_, m_units_ - band * band_);
    const int m_block = (band * band_ + inside % height) * m_step_ + m_rank_;
    tile.n = (inside / height * n_step_ + n_rank_) * C::kBlockN;
    if constexpr (C::kGrouping == Grouping::kRows) {
      place_in_group(m_block, tile);
    } else {
      tile.m = m_block * C::kBlockM;
      tile.row_end = params_.m;
      tile.b_row = tile.n;
    }
  }

  __device__ __forceinline__ void place_in_group(int m_block, Tile& tile) const {
    int low = 0, high = params_.num_groups;  // prefix[low] <= m_block < prefix[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (prefix_[middle] <= m_block ? low : high) = middle;
    }
    const int first = params_.offsets[low];
    tile.group = low;
    tile.m = first + (m_block - prefix_[low]) * C::kBlockM;
    tile.row_end = first + params_.counts[low];
    tile.b_row = low * params_.n + tile.n;
  }

  const GemmParams& params_;
  const int* prefix_;
  int band_, m_step_, n_step_, m_rank_, n_rank_, m_units_, n_units_, unit_, half_;
};

}  // namespace dsv3rt
