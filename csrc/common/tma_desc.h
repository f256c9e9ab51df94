// Tensor maps for the copy engine. The driver's encoder is looked up at run time: no link against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dsv3rt {

struct MapSpec {
  const void* base;
  int64_t inner, outer;       // extents in elements, innermost first
  int64_t outer_stride_bytes; // a multiple of 16
  int box_inner, box_outer;
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
};

inline const char* encode_map(CUtensorMap& map, const MapSpec& spec) {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static const Encoder encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(entry) : nullptr;
  }();
  if (encoder == nullptr) return "the driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed";
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(spec.inner), static_cast<cuuint64_t>(spec.outer)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(spec.outer_stride_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(spec.box_inner), static_cast<cuuint32_t>(spec.box_outer)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUresult status = encoder(&map, spec.type, 2, const_cast<void*>(spec.base), extents, strides, box,
                                  element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, spec.swizzle,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused an operand's layout";
}

}  // namespace dsv3rt
