// From a choice to the compiled kernel that makes it. Each file of instances/ instantiates find_launcher once.
#pragma once

#include <algorithm>
#include <utility>

#include "common/launch.h"
#include "common/tma_desc.h"
#include "gemm/heuristics.h"
#include "gemm/sm90_fp8_gemm.cuh"

namespace dsv3rt {

using GemmLauncher = const char* (*)(const GemmParams&, const GemmChoice&, cudaStream_t);

inline MapSpec operand_map(const uint8_t* data, int64_t rows, int64_t k, int64_t stride, int box_rows) {
  return {data, k, rows, stride, kBlockK, box_rows, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B};
}

inline MapSpec row_scale_map(const float* scales, int64_t rows, int64_t k_blocks, int64_t stride, int box_rows) {
  return {scales,
          rows,
          k_blocks,
          stride * int64_t(sizeof(float)),
          box_rows,
          1,
          CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
          CU_TENSOR_MAP_SWIZZLE_NONE};
}

// The rows of B in groups of 16 (see pairs_rows), as (group, half, quad, pair, k).
inline const char* encode_paired_rows(CUtensorMap& map, const GemmParams& params, int box_rows) {
  const auto stride = [&](int rows) { return static_cast<cuuint64_t>(params.stride_b * rows); };
  return tma_desc::encode<5>(map, params.b, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B,
                             {cuuint64_t(params.k), 2, 4, 2, cuuint64_t(params.n / kPairedRowGroup)},
                             {stride(1), stride(4), stride(2), stride(kPairedRowGroup)},
                             {cuuint32_t(kBlockK), 2, 4, 2, cuuint32_t(box_rows / kPairedRowGroup)});
}

// D as (groups, m, n) in slabs of 64 rows of 128 bytes.
template <typename C>
const char* encode_output_map(const GemmParams& params, CUtensorMap& map) {
  const auto extent = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const int64_t groups = C::kGrouping == Grouping::kDepth ? params.num_groups : 1;
  const int64_t row_bytes = params.stride_d * C::kElementBytes;
  return tma_desc::encode<3>(
      map, params.d,
      C::kOutput == GemmOutput::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
      CU_TENSOR_MAP_SWIZZLE_128B, {extent(params.n), extent(params.m), extent(groups)},
      {extent(row_bytes), extent(row_bytes * params.m)}, {cuuint32_t(C::kSlabColumns), cuuint32_t(kWaveRows), 1});
}

template <typename C>
const char* encode_maps(const GemmParams& params, GemmMaps& maps) {
  const int64_t k_blocks = ceil_div(params.k, kBlockK);
  [[maybe_unused]] const int64_t b_rows = int64_t(params.n) * (C::kGrouping == Grouping::kRows ? params.num_groups : 1);
  const MapSpec a =
      operand_map(params.a, params.m, params.k, params.stride_a, C::kShare == Share::kA ? C::kBlockM / 2 : C::kBlockM);
  if (const char* error = encode_map(maps.a, a)) return error;
  constexpr int kBoxB = C::kShare == Share::kB ? C::kBlockN / 2 : C::kBlockN;
  if constexpr (C::kPairedRows) {
    if (params.n % kPairedRowGroup != 0) return "this tile needs n to be a multiple of 16";
    if (const char* error = encode_paired_rows(maps.b, params, kBoxB)) return error;
  } else {
    const MapSpec b = operand_map(params.b, b_rows, params.k, params.stride_b, kBoxB);
    if (const char* error = encode_map(maps.b, b)) return error;
  }
  const MapSpec scale_a = row_scale_map(params.scale_a, params.m, k_blocks, params.stride_scale_a, C::kBlockM);
  if (const char* error = encode_map(maps.scale_a, scale_a)) return error;
  if (C::kScaleB == ScaleB::kRow) {
    const MapSpec scale_b = row_scale_map(params.scale_b, params.n, k_blocks, params.stride_scale_b, C::kBlockN);
    if (const char* error = encode_map(maps.scale_b, scale_b)) return error;
  }
  return encode_output_map<C>(params, maps.d);
}

template <typename C>
const char* launch_gemm(const GemmParams& params, const GemmChoice& choice, cudaStream_t stream) {
  GemmMaps maps;
  if (const char* error = encode_maps<C>(params, maps)) return error;
  constexpr int kSharedBytes = sizeof(GemmStorage<C>);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  const auto kernel = sm90_fp8_gemm_kernel<C>;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));

  int blocks = std::max(params.num_sms / C::kClusterSize, 1) * C::kClusterSize;
  if (C::kShare == Share::kDepth) {
    const int needed = 2 * ceil_div(params.m, C::kBlockM) * ceil_div(params.n, C::kBlockN);
    if (needed > blocks) return "halves of a depth need a cluster for each tile";
    blocks = needed;
  }

  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {C::kClusterSize, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  DSV3RT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, maps, params, TileRaster{choice.band}));
  return nullptr;
}

template <ScaleB kScaleB, GemmOutput kOutput, Grouping kGrouping, int kIndex, Share kShare>
GemmLauncher compiled_launcher() {
  constexpr TileShape kShape = kTileShapes[kIndex];
  if constexpr (is_compiled(kShape, kShare, kScaleB, kOutput, kGrouping)) {
    return launch_gemm<GemmConfig<kShape.m, kShape.n, kShare, kScaleB, kOutput, kGrouping>>;
  } else {
    return nullptr;
  }
}

template <ScaleB kScaleB, GemmOutput kOutput, Grouping kGrouping, int kIndex>
GemmLauncher launcher_of_shape(Share share) {
  switch (share) {
    case Share::kNone: return compiled_launcher<kScaleB, kOutput, kGrouping, kIndex, Share::kNone>();
    case Share::kA: return compiled_launcher<kScaleB, kOutput, kGrouping, kIndex, Share::kA>();
    case Share::kB: return compiled_launcher<kScaleB, kOutput, kGrouping, kIndex, Share::kB>();
    case Share::kDepth: return compiled_launcher<kScaleB, kOutput, kGrouping, kIndex, Share::kDepth>();
  }
  return nullptr;
}

template <ScaleB kScaleB, GemmOutput kOutput, Grouping kGrouping, int... kIndices>
GemmLauncher search_shapes(const GemmChoice& choice, std::integer_sequence<int, kIndices...>) {
  GemmLauncher found = nullptr;
  ((kTileShapes[kIndices].m == choice.tile.m && kTileShapes[kIndices].n == choice.tile.n
        ? void(found = launcher_of_shape<kScaleB, kOutput, kGrouping, kIndices>(choice.share))
        : void()),
   ...);
  return found;
}

// Null when no such kernel was compiled.
template <ScaleB kScaleB, GemmOutput kOutput, Grouping kGrouping>
GemmLauncher find_launcher(const GemmChoice& choice) {
  return search_shapes<kScaleB, kOutput, kGrouping>(choice, std::make_integer_sequence<int, kNumTileShapes>{});
}

}  // namespace dsv3rt
