// RMSNorm by rows. A row lies in the registers of the threads that share it, and every kernel sums its squares in the
// same order, so that all of them agree to the bit.
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

// How a row is shared: thread t holds octets t, t + kThreads, ..., at most kFours * 4 of them.
template <int kThreadsOfRow, int kFoursOfThread>
struct RowShape {
  static constexpr int kThreads = kThreadsOfRow;
  static constexpr int kFours = kFoursOfThread;
  static constexpr int kMaxColumns = kThreads * kFours * 4 * 8;
};

// One thread's part of a row, and where it lies.
template <class Shape>
struct RowPart {
  TileOctets<__nv_bfloat16> octets[Shape::kFours];
  int64_t row;
  bool exists;

  static __device__ __forceinline__ int thread() { return threadIdx.x % Shape::kThreads; }
  static __device__ __forceinline__ int index(int four, int i) { return (four * 4 + i) * Shape::kThreads + thread(); }
};

__device__ __forceinline__ Octet<__nv_bfloat16> add_octets(const Octet<__nv_bfloat16>& a,
                                                           const Octet<__nv_bfloat16>& b) {
  float sums[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = __fadd_rn(a.get(i), b.get(i));
  return round_octet(sums);
}

template <class Shape>
__device__ __forceinline__ void load_row(const NormParams& params, RowPart<Shape>& part) {
  const int num_octets = part.exists ? params.out.num_columns / 8 : 0;
  const auto* x = static_cast<const __nv_bfloat16*>(params.x) + part.row * params.x_stride;
#pragma unroll
  for (int four = 0; four < Shape::kFours; ++four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part.octets[four][i].clear();
      if (part.index(four, i) < num_octets) part.octets[four][i].load(x + part.index(four, i) * 8);
    }
  }
  if (params.residual == nullptr) return;
  const auto* residual = static_cast<const __nv_bfloat16*>(params.residual) + part.row * params.residual_stride;
  auto* sum = static_cast<uint4*>(params.sum) + part.row * num_octets;
#pragma unroll
  for (int four = 0; four < Shape::kFours; ++four) {
    TileOctets<__nv_bfloat16> added;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      added[i].clear();
      if (part.index(four, i) < num_octets) added[i].load(residual + part.index(four, i) * 8);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      part.octets[four][i] = add_octets(part.octets[four][i], added[i]);
      if (part.index(four, i) < num_octets) sum[part.index(four, i)] = part.octets[four][i].words;
    }
  }
}

// The order in which squares are added, which the width alone decides: those of eight neighbours one after the other,
// the sixteen sums of a tile by halves, the tiles of a group one after the other, the groups by halves.
struct TileGroups {
  int count;  // a power of two
  int tiles;  // of a group

  DSV3RT_HOST_DEVICE explicit TileGroups(int num_columns) : count(kMostGroups) {
    const int all = ceil_div(num_columns, kTile);
    while (count > 1 && all % count != 0 && ceil_div(all, count / 2) <= kMostTilesKept) count /= 2;
    tiles = ceil_div(all, count);
  }

  static constexpr int kMostGroups = 8;     // CTAs of a cluster share a row
  static constexpr int kMostTilesKept = 7;  // of 128 rows, in a CTA's shared memory and registers
};

// Of the squares of each octet, over the sixteen lanes of a tile. Lanes exchange half of their octets as long as they
// have several: those of lane l end up with the octet of number l / (16 / kOctets) % kOctets.
template <int kOctets>
__device__ __forceinline__ float sum_over_tile(float (&squares)[kOctets]) {
  int kept = kOctets;
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    if (kept > 1) {
      kept /= 2;
      const bool upper = threadIdx.x & distance;
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float given = upper ? squares[i] : squares[i + kept], own = upper ? squares[i + kept] : squares[i];
        squares[i] = __fadd_rn(own, __shfl_xor_sync(~0u, given, distance));
      }
    } else {
      squares[0] = __fadd_rn(squares[0], __shfl_xor_sync(~0u, squares[0], distance));
    }
  }
  return squares[0];
}

__device__ __forceinline__ float sum_of_squares(const Octet<__nv_bfloat16>& x) {
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < 8; ++k) squares = __fmaf_rn(x.get(k), x.get(k), squares);
  return squares;
}

// 1 / sqrt(mean(x^2) + eps)
__device__ __forceinline__ float rstd_of(const NormParams& params, float squares) {
  return __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(params.out.num_columns)), params.eps));
}

// The sums of a row's tiles: kMaxNormColumns / kTile of them, for each row of a block.
using RowTileSums = float[kMaxNormColumns / kTile];

// Every thread of the block calls it.
template <class Shape>
__device__ __forceinline__ float row_rstd(const NormParams& params, const RowPart<Shape>& part, RowTileSums* sums) {
  constexpr int kOctets = Shape::kFours * 4, kLanes = 16 / kOctets;
  float squares[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) squares[i] = sum_of_squares(part.octets[i / 4][i % 4]);
  const float of_tile = sum_over_tile(squares);
  float* own = sums[threadIdx.x / Shape::kThreads];
  const int lane = threadIdx.x % 16, tile = part.index(0, lane / kLanes) / 16;
  if (lane % kLanes == 0) own[tile] = of_tile;
  if constexpr (Shape::kThreads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  const TileGroups groups(params.out.num_columns);
  const int group = threadIdx.x % TileGroups::kMostGroups;
  float sum = 0.0f;
  for (int i = 0; i < groups.tiles; ++i) {
    const int index = group * groups.tiles + i;
    if (group < groups.count && index * kTile < params.out.num_columns) sum = __fadd_rn(sum, own[index]);
  }
#pragma unroll
  for (int distance = TileGroups::kMostGroups / 2; distance > 0; distance /= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
  }
  return rstd_of(params, sum);
}

template <typename Weight>
__device__ __forceinline__ Octet<__nv_bfloat16> norm_octet(const Octet<__nv_bfloat16>& x, float rstd,
                                                           const Octet<Weight>& weight) {
  float normed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) normed[i] = __fmul_rn(__fmul_rn(x.get(i), rstd), weight.get(i));
  return round_octet(normed);
}

// Four octets of a row, each in a tile of its own that fifteen neighbours share. Whole warps call it.
template <class Shape>
__device__ __forceinline__ void quantize_four(const QuantOutput& out, const RowPart<Shape>& part, int four) {
  const TileScale scale = tile_scale(shared_amax<__nv_bfloat16>(part.octets[four]), out.scale_mask);
  const int lane = threadIdx.x % 16, tile = part.index(four, lane) / 16;
  if (lane < 4 && tile * kTile < out.num_columns) out.scale[tile * out.scale_stride + part.row] = scale.scale;
  auto* target = reinterpret_cast<uint2*>(out.data + part.row * out.num_columns);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = __shfl_sync(~0u, scale.inverse, i, 4);
    const int index = part.index(four, i);
    if (index * 8 < out.num_columns) target[index] = quantize_octet(part.octets[four][i], inverse);
  }
}

// The rows that the threads of a block share, from first_row: everything about them but the column form. Every thread
// of the block calls it.
template <class Shape, typename Weight>
__device__ __forceinline__ void norm_rows(const NormParams& params, int64_t first_row, RowTileSums* sums) {
  RowPart<Shape> part;
  part.row = first_row + threadIdx.x / Shape::kThreads;
  part.exists = part.row < params.out.num_rows;
  load_row(params, part);
  const float rstd = row_rstd(params, part, sums);
  if (!part.exists) return;
  if (part.thread() == 0) params.rstd[part.row] = rstd;
  const int num_octets = params.out.num_columns / 8;
  auto* y = static_cast<uint4*>(params.y) + part.row * num_octets;
#pragma unroll
  for (int four = 0; four < Shape::kFours; ++four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int index = part.index(four, i);
      Octet<Weight> weight;
      weight.clear();
      if (index < num_octets) weight.load(static_cast<const Weight*>(params.weight) + index * 8);
      part.octets[four][i] = norm_octet(part.octets[four][i], rstd, weight);
      if (params.y != nullptr && index < num_octets) y[index] = part.octets[four][i].words;
    }
    if (params.out.data != nullptr) quantize_four(params.out, part, four);
  }
}

constexpr int kNormThreads = 256;

template <class Shape, typename Weight>
__global__ void __launch_bounds__(kNormThreads, 3) norm_rows_kernel(const NormParams params) {
  __shared__ RowTileSums sums[kNormThreads / Shape::kThreads];
  norm_rows<Shape, Weight>(params, blockIdx.x * int64_t(kNormThreads / Shape::kThreads), sums);
}

}  // namespace dsv3rt
