// RMSNorm by rows. A row lies in the registers of the threads that share it, and every kernel sums its squares in the
// same order, so that all of them agree to the bit.
#pragma once

#include "quant/tile.cuh"

namespace dsv3rt {

constexpr int kRowOctets = 4;  // of a thread

// How a row is shared: thread t holds octets t, t + kThreads, ..., as far as they exist. kIsWhole: all do.
template <int kThreadsOfRow, bool kIsWhole = false>
struct RowShape {
  static constexpr int kThreads = kThreadsOfRow;
  static constexpr bool kWhole = kIsWhole;
  static constexpr int kMaxColumns = kThreads * kRowOctets * 8;
  static constexpr int kRows = kThreads < 128 ? 256 / kThreads : 1;  // of a block that norms rows alone
  static constexpr int kBlockThreads = kRows * kThreads;
  static constexpr int kBlocks = 1024 / kBlockThreads;  // a multiprocessor, at least
};

// One thread's part of a row, and where it lies.
template <class Shape>
struct RowPart {
  TileOctets<__nv_bfloat16> octets;
  int64_t row;
  int num_octets;  // of a row; 0: the row does not exist

  RowPart() = default;
  __device__ __forceinline__ RowPart(const NormParams& params, int64_t row, bool exists = true)
      : row(row), num_octets(exists && row < params.out.num_rows ? params.out.num_columns / 8 : 0) {}

  static __device__ __forceinline__ int thread() { return threadIdx.x % Shape::kThreads; }
  static __device__ __forceinline__ int index(int i) { return i * Shape::kThreads + thread(); }
  __device__ __forceinline__ bool exists() const { return num_octets > 0; }
  __device__ __forceinline__ bool has(int i) const { return Shape::kWhole ? exists() : index(i) < num_octets; }
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
  const auto load = [&part](const void* base, int64_t stride, TileOctets<__nv_bfloat16>& octets) {
    const auto* row = static_cast<const __nv_bfloat16*>(base) + part.row * stride;
#pragma unroll
    for (int i = 0; i < kRowOctets; ++i) {
      octets[i].clear();
      if (part.has(i)) octets[i].load(row + part.index(i) * 8);
    }
  };
  load(params.x, params.x_stride, part.octets);
  if (params.residual == nullptr) return;
  TileOctets<__nv_bfloat16> added;
  load(params.residual, params.residual_stride, added);
  auto* sum = static_cast<uint4*>(params.sum) + part.row * part.num_octets;
#pragma unroll
  for (int i = 0; i < kRowOctets; ++i) {
    part.octets[i] = add_octets(part.octets[i], added[i]);
    if (part.has(i)) sum[part.index(i)] = part.octets[i].words;
  }
}

// Of this thread's part of a row.
template <class Shape>
__device__ __forceinline__ float sum_of_squares(const RowPart<Shape>& part) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kRowOctets; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float x = part.octets[i].get(k);
      squares = __fmaf_rn(x, x, squares);
    }
  }
  return squares;
}

__device__ __forceinline__ float sum_over_warp(float part) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) part += __shfl_xor_sync(~0u, part, distance);
  return part;
}

// Of the warps of this thread's row; a row is whole warps of the block.
template <int kThreadsOfRow>
__device__ __forceinline__ float add_warps(const float* warp_sums) {
  constexpr int kWarps = kThreadsOfRow / 32;
  const float* own = warp_sums + threadIdx.x / kThreadsOfRow * kWarps;
  float sum = own[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += own[warp];
  return sum;
}

// Over the threads of each row. Every thread of the block calls it.
template <int kThreadsOfRow>
__device__ __forceinline__ float sum_over_row(float part, float* warp_sums) {
  part = sum_over_warp(part);
  if constexpr (kThreadsOfRow > 32) {
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = part;
    __syncthreads();
    part = add_warps<kThreadsOfRow>(warp_sums);
  }
  return part;
}

// 1 / sqrt(mean(x^2) + eps)
__device__ __forceinline__ float rstd_of(const NormParams& params, float squares) {
  return __frsqrt_rn(__fmaf_rn(squares, params.inverse_columns, params.eps));
}

template <typename Weight>
__device__ __forceinline__ Octet<__nv_bfloat16> norm_octet(const Octet<__nv_bfloat16>& x, float rstd,
                                                           const Octet<Weight>& weight) {
  float normed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) normed[i] = __fmul_rn(__fmul_rn(x.get(i), rstd), weight.get(i));
  return round_octet(normed);
}

// A thread's octets of a row, each in a tile of its own that fifteen neighbours share. Whole warps call it.
template <class Shape>
__device__ __forceinline__ void quantize_row(const QuantOutput& out, const RowPart<Shape>& part) {
  const TileScale scale = tile_scale(shared_amax<__nv_bfloat16>(part.octets), out.scale_mask);
  const int lane = threadIdx.x % 16, tile = part.index(lane) / 16;
  if (lane < kRowOctets && (Shape::kWhole || tile * kTile < out.num_columns)) {
    out.scale[tile * out.scale_stride + part.row] = scale.scale;
  }
  auto* target = reinterpret_cast<uint2*>(out.data + part.row * out.num_columns);
#pragma unroll
  for (int i = 0; i < kRowOctets; ++i) {
    const float inverse = __shfl_sync(~0u, scale.inverse, i, kRowOctets);
    if (part.has(i)) target[part.index(i)] = quantize_octet(part.octets[i], inverse);
  }
}

// The rows that the threads of a block share, from first_row: everything about them but the column form. Every thread
// of the block calls it. kWeightsFirst: loads the weights while the row is on its way.
template <class Shape, typename Weight, bool kWeightsFirst>
__device__ __forceinline__ void norm_rows(const NormParams& params, int64_t first_row, float* warp_sums) {
  RowPart<Shape> part(params, first_row + threadIdx.x / Shape::kThreads);
  load_row(params, part);
  const auto weight_of = [&part, &params](int i) {
    Octet<Weight> weight;
    weight.clear();
    if (part.has(i)) weight.load(static_cast<const Weight*>(params.weight) + part.index(i) * 8);
    return weight;
  };
  TileOctets<Weight> weights;
  if (kWeightsFirst) {
#pragma unroll
    for (int i = 0; i < kRowOctets; ++i) weights[i] = weight_of(i);
  }
  const float rstd = rstd_of(params, sum_over_row<Shape::kThreads>(sum_of_squares(part), warp_sums));
  if (!part.exists()) return;
  if (part.thread() == 0) params.rstd[part.row] = rstd;
  auto* y = static_cast<uint4*>(params.y) + part.row * part.num_octets;
#pragma unroll
  for (int i = 0; i < kRowOctets; ++i) {
    part.octets[i] = norm_octet(part.octets[i], rstd, kWeightsFirst ? weights[i] : weight_of(i));
    if (params.y != nullptr && part.has(i)) y[part.index(i)] = part.octets[i].words;
  }
  if (params.out.data != nullptr) quantize_row(params.out, part);
}

// kCastsAlone: of x alone, to nothing but codes. Such a launch moves half as many bytes a row as others and gains more
// from a fifth block on a multiprocessor than from weights that are there in time.
template <class Shape, typename Weight, bool kCastsAlone>
__global__ void __launch_bounds__(Shape::kBlockThreads, Shape::kBlocks + kCastsAlone)
    norm_rows_kernel(const __grid_constant__ NormParams params) {
  __shared__ float warp_sums[Shape::kBlockThreads / 32];
  constexpr bool kWeightsFirst = sizeof(Weight) == 2 && !kCastsAlone;
  norm_rows<Shape, Weight, kWeightsFirst>(params, blockIdx.x * int64_t(Shape::kRows), warp_sums);
}

}  // namespace dsv3rt
