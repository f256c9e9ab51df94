// A borrowed view of an array of any framework.
#pragma once

#include <array>
#include <cstdint>

#include "common/dlpack_abi.h"

namespace dsv3rt {

constexpr int kMaxRank = 6;

enum class DataType : uint8_t { kFloat32, kBFloat16, kFloat8E4M3, kUInt8, kInt32, kInt64, kOther };

struct TensorView {
  void* data = nullptr;
  DataType dtype = DataType::kOther;
  dlpack::Device device{};
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  // in elements
  int (*current_stream)(int32_t, int32_t, void**) = nullptr;

  int64_t num_elements() const {
    int64_t count = 1;
    for (int axis = 0; axis < rank; ++axis) count *= shape[axis];
    return count;
  }
};

inline const char* name_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32: return "float32";
    case DataType::kBFloat16: return "bfloat16";
    case DataType::kFloat8E4M3: return "float8_e4m3fn";
    case DataType::kUInt8: return "uint8";
    case DataType::kInt32: return "int32";
    case DataType::kInt64: return "int64";
    case DataType::kOther: break;
  }
  return "an unsupported dtype";
}

}  // namespace dsv3rt
