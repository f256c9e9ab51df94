// Argument checks that the bindings of this room share.
#pragma once

#include <optional>
#include <string>

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "common/math.h"
#include "quant/params.h"

namespace dsv3rt {

namespace py = pybind11;

constexpr int64_t kTile = 128;
using OptionalView = std::optional<TensorView>;

inline int64_t alignment_in_elements(DataType dtype) {
  return dtype == DataType::kFloat32 ? 4 : dtype == DataType::kBFloat16 ? 8 : 16;
}

inline QuantInput input_of(DataType dtype) {
  return dtype == DataType::kBFloat16  ? QuantInput::kBFloat16
         : dtype == DataType::kFloat32 ? QuantInput::kFloat32
                                       : QuantInput::kFloat8;
}

// An array of rows that kernels read 16 bytes at a time.
inline void check_rows(const ArgCheck& check, const TensorView& view) {
  check.shape({kAny, kAny}).strides({kAny, 1}).aligned(16).stride_multiple_of(0, alignment_in_elements(view.dtype));
}

inline void check_codes(const char* op, const char* name, const TensorView& codes, const TensorView& x,
                        std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides, int alignment) {
  ArgCheck(op, name, codes)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat8E4M3, DataType::kUInt8})
      .shape(shape)
      .strides(strides)
      .aligned(alignment);
}

// Scales in the GEMM's layout: rows contiguous, columns a multiple of four numbers apart.
inline void check_row_scales(const char* op, const char* name, const TensorView& scale, const TensorView& x,
                             int64_t num_rows, int64_t num_columns) {
  ArgCheck(op, name, scale)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({num_rows, ceil_div(num_columns, kTile)})
      .strides({1, kAny})
      .stride_multiple_of(1, 4)
      .stride_at_least(1, num_rows)
      .aligned(16);
}

inline void both_or_none(const char* op, const char* names, bool first, bool second) {
  if (first != second) {
    throw py::value_error(std::string(op) + ": " + names + " must be given together, got one of them");
  }
}

// Transposed codes (D, Tp) and their scales (D, Tp / 128).
inline void set_transposed(const char* op, const std::string& prefix, const TensorView& x, int64_t num_rows,
                           int64_t num_columns, const TensorView& codes, const TensorView& scale, uint8_t*& data_t,
                           float*& scale_t, int64_t& stride) {
  const int64_t padded_rows = round_up(num_rows, kTile);
  const std::string data_name = prefix + "data_t", scale_name = prefix + "scale_t";
  check_codes(op, data_name.c_str(), codes, x, {num_columns, padded_rows}, {padded_rows, 1}, 16);
  ArgCheck(op, scale_name.c_str(), scale)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({num_columns, padded_rows / kTile})
      .strides({1, kAny})
      .stride_at_least(1, num_columns);
  data_t = static_cast<uint8_t*>(codes.data);
  scale_t = static_cast<float*>(scale.data);
  // Along an axis of one tile a framework may report any stride.
  stride = scale.strides[1];
}

inline QuantOutput output_of(const char* op, const TensorView& x, int64_t num_rows, int64_t num_columns,
                             const TensorView& data, const TensorView& scale, bool pow2_scales) {
  check_codes(op, "data", data, x, {num_rows, num_columns}, {num_columns, 1}, 16);
  check_row_scales(op, "scale", scale, x, num_rows, num_columns);
  QuantOutput out{};
  out.data = static_cast<uint8_t*>(data.data);
  out.scale = static_cast<float*>(scale.data);
  out.scale_stride = scale.strides[1];
  out.num_rows = num_rows;
  out.num_columns = static_cast<int>(num_columns);
  out.scale_mask = pow2_scales ? kPow2ScaleMask : 0;
  return out;
}

}  // namespace dsv3rt
