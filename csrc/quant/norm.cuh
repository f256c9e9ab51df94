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
  static constexpr int kRows = kThreads < 128 ? 256 / kThreads : 1;  // of a block that norms rows alone
  static constexpr int kBlockThreads = kRows * kThreads;
  static constexpr int kBlocks = kFours == 1 ? 1024 / kBlockThreads : 3;  // a multiprocessor, at least
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

// Sums over the threads of each row; a row is whole warps of the block. Every thread of the block calls it.
template <int kThreadsOfRow>
__device__ __forceinline__ float sum_over_row(float part, float* warp_sums) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) part += __shfl_xor_sync(~0u, part, distance);
  if constexpr (kThreadsOfRow > 32) {
    constexpr int kWarps = kThreadsOfRow / 32;
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = part;
    __syncthreads();
    const float* own = warp_sums + threadIdx.x / kThreadsOfRow * kWarps;
    part = own[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) part += own[warp];
  }
  return part;
}

// 1 / sqrt(mean(x^2) + eps)
template <class Shape>
__device__ __forceinline__ float row_rstd(const NormParams& params, const RowPart<Shape>& part, float* warp_sums) {
  float squares = 0.0f;
#pragma unroll
  for (int four = 0; four < Shape::kFours; ++four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float x = part.octets[four][i].get(k);
        squares = __fmaf_rn(x, x, squares);
      }
    }
  }
  squares = sum_over_row<Shape::kThreads>(squares, warp_sums);
  return __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(params.out.num_columns)), params.eps));
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
__device__ __forceinline__ void norm_rows(const NormParams& params, int64_t first_row, float* warp_sums) {
  RowPart<Shape> part;
  part.row = first_row + threadIdx.x / Shape::kThreads;
  part.exists = part.row < params.out.num_rows;
  load_row(params, part);
  const int num_octets = params.out.num_columns / 8;
  TileOctets<Weight> weights;
  const auto load_weights = [&](int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i].clear();
      const int index = part.index(four, i);
      if (index < num_octets) weights[i].load(static_cast<const Weight*>(params.weight) + index * 8);
    }
  };
  load_weights(0);  // while the row is on its way
  const float rstd = row_rstd(params, part, warp_sums);
  if (!part.exists) return;
  if (part.thread() == 0) params.rstd[part.row] = rstd;
  auto* y = static_cast<uint4*>(params.y) + part.row * num_octets;
#pragma unroll
  for (int four = 0; four < Shape::kFours; ++four) {
    if (four > 0) load_weights(four);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int index = part.index(four, i);
      part.octets[four][i] = norm_octet(part.octets[four][i], rstd, weights[i]);
      if (params.y != nullptr && index < num_octets) y[index] = part.octets[four][i].words;
    }
    if (params.out.data != nullptr) quantize_four(params.out, part, four);
  }
}

template <class Shape, typename Weight>
__global__ void __launch_bounds__(Shape::kBlockThreads, Shape::kBlocks)
    norm_rows_kernel(const __grid_constant__ NormParams params) {
  __shared__ float warp_sums[Shape::kBlockThreads / 32];
  norm_rows<Shape, Weight>(params, blockIdx.x * int64_t(Shape::kRows), warp_sums);
}

}  // namespace dsv3rt
