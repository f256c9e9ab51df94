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

template <typename C>
const char* encode_maps(const GemmParams& params, GemmMaps& maps) {
  const int64_t k_blocks = ceil_div(params.k, kBlockK);
  const int64_t b_rows = int64_t(params.n) * (C::kGrouping == Grouping::kRows ? params.num_groups : 1);
  const MapSpec a{params.a,
                  params.k,
                  params.m,
                  params.stride_a,
                  kBlockK,
                  C::kShare == Share::kA ? C::kBlockM / 2 : C::kBlockM,
                  CU_TENSOR_MAP_DATA_TYPE_UINT8,
                  CU_TENSOR_MAP_SWIZZLE_128B};
  const MapSpec b{params.b,
                  params.k,
                  b_rows,
                  params.stride_b,
                  kBlockK,
                  C::kShare == Share::kB ? C::kBlockN / 2 : C::kBlockN,
                  CU_TENSOR_MAP_DATA_TYPE_UINT8,
                  CU_TENSOR_MAP_SWIZZLE_128B};
  const MapSpec scale_a{params.scale_a,
                        params.m,
                        k_blocks,
                        params.stride_scale_a * 4,
                        C::kBlockM,
                        1,
                        CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                        CU_TENSOR_MAP_SWIZZLE_NONE};
  if (const char* error = encode_map(maps.a, a)) return error;
  if (const char* error = encode_map(maps.b, b)) return error;
  if (const char* error = encode_map(maps.scale_a, scale_a)) return error;
  if (C::kScaleB == ScaleB::kRow) {
    const MapSpec scale_b{params.scale_b,
                          params.n,
                          k_blocks,
                          params.stride_scale_b * 4,
                          C::kBlockN,
                          1,
                          CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                          CU_TENSOR_MAP_SWIZZLE_NONE};
    if (const char* error = encode_map(maps.scale_b, scale_b)) return error;
  }
  return nullptr;
}

template <typename C>
const char* launch_gemm(const GemmParams& params, const GemmChoice& choice, cudaStream_t stream) {
  GemmMaps maps;
  if (const char* error = encode_maps<C>(params, maps)) return error;
  constexpr int kSharedBytes = sizeof(GemmStorage<C>);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(C::kStages >= 3);
  const auto kernel = sm90_fp8_gemm_kernel<C>;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));

  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {C::kClusterSize, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::max(params.num_sms / C::kClusterSize, 1) * C::kClusterSize);
  config.blockDim = dim3(kGemmThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  DSV3RT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, maps, params, TileRaster{choice.band}));
  return nullptr;
}

template <ScaleB kScaleB, GemmOutput kOutput, Grouping kGrouping, int kIndex>
GemmLauncher launcher_of_shape(Share share) {
  constexpr TileShape kShape = kTileShapes[kIndex];
  switch (share) {
    case Share::kNone: return launch_gemm<GemmConfig<kShape.m, kShape.n, Share::kNone, kScaleB, kOutput, kGrouping>>;
    case Share::kA: return launch_gemm<GemmConfig<kShape.m, kShape.n, Share::kA, kScaleB, kOutput, kGrouping>>;
    case Share::kB:
      if constexpr (kGrouping != Grouping::kRows) {
        return launch_gemm<GemmConfig<kShape.m, kShape.n, Share::kB, kScaleB, kOutput, kGrouping>>;
      }
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
