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

namespace tma_desc {

using Encoder = decltype(&cuTensorMapEncodeTiled);

inline Encoder find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(entry) : nullptr;
}

template <int kRank>
const char* encode(CUtensorMap& map, const void* base, CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                   const cuuint64_t (&extents)[kRank], const cuuint64_t (&strides)[kRank - 1],
                   const cuuint32_t (&box)[kRank]) {
  static const Encoder encoder = find_encoder();
  if (encoder == nullptr) return "the driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed";
  cuuint32_t element_strides[kRank];
  for (cuuint32_t& stride : element_strides) stride = 1;
  const CUresult status = encoder(&map, type, kRank, const_cast<void*>(base), extents, strides, box, element_strides,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_ERROR_INVALID_VALUE) return "cuTensorMapEncodeTiled refused an operand's layout";
  if (status == CUDA_ERROR_INVALID_CONTEXT) return "cuTensorMapEncodeTiled found no CUDA context in this thread";
  return status == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled failed";
}

}  // namespace tma_desc

inline const char* encode_map(CUtensorMap& map, const MapSpec& spec) {
  return tma_desc::encode<2>(map, spec.base, spec.type, spec.swizzle,
                             {static_cast<cuuint64_t>(spec.inner), static_cast<cuuint64_t>(spec.outer)},
                             {static_cast<cuuint64_t>(spec.outer_stride_bytes)},
                             {static_cast<cuuint32_t>(spec.box_inner), static_cast<cuuint32_t>(spec.box_outer)});
}

// A (rows, heads, columns) BF16 array as [64-column slab][row][64 columns] in 128-byte swizzle: one box is `box_rows`
// rows of all slabs of one head. Coordinates: (0, row, 0, head).
struct SlabMapSpec {
  const void* base;
  int64_t rows, heads;
  int columns;                          // a multiple of 64
  int64_t row_stride, head_stride;      // in elements, multiples of 8 where the extent is above 1
  int box_rows;
};

inline const char* encode_map(CUtensorMap& map, const SlabMapSpec& spec) {
  constexpr int kSlab = 64, kElementBytes = 2;
  const auto bytes = [](int64_t extent, int64_t stride) {  // a stride along one element addresses nothing
    return static_cast<cuuint64_t>(extent > 1 ? stride * kElementBytes : kSlab * kElementBytes);
  };
  const auto slabs = static_cast<cuuint32_t>(spec.columns / kSlab);
  return tma_desc::encode<4>(
      map, spec.base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B,
      {kSlab, static_cast<cuuint64_t>(spec.rows), slabs, static_cast<cuuint64_t>(spec.heads)},
      {bytes(spec.rows, spec.row_stride), kSlab * kElementBytes, bytes(spec.heads, spec.head_stride)},
      {kSlab, static_cast<cuuint32_t>(spec.box_rows), slabs, 1});
}

}  // namespace dsv3rt
