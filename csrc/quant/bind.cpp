#include "quant/bind.h"

#include <optional>

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "common/math.h"
#include "quant/params.h"

namespace dsv3rt {
namespace {

constexpr char kOp[] = "quantize_1x128";
constexpr int64_t kTile = 128;

void check_transposed(Quantize1x128Params& params, const TensorView& x, const TensorView& data_t,
                      const TensorView& scale_t) {
  const int64_t num_rows = x.shape[0], num_columns = x.shape[1], padded_rows = round_up(num_rows, kTile);
  ArgCheck(kOp, "data_t", data_t)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat8E4M3, DataType::kUInt8})
      .shape({num_columns, padded_rows})
      .strides({padded_rows, 1})
      .aligned(16);
  ArgCheck(kOp, "scale_t", scale_t)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({num_columns, padded_rows / kTile})
      .strides({1, kAny})
      .stride_at_least(1, num_columns);
  params.data_t = static_cast<uint8_t*>(data_t.data);
  params.scale_t = static_cast<float*>(scale_t.data);
  params.scale_t_stride = scale_t.strides[1];
}

void bound_quantize_1x128(const TensorView& x, const TensorView& data, const TensorView& scale,
                          const std::optional<TensorView>& data_t, const std::optional<TensorView>& scale_t,
                          bool pow2_scales, pybind11::handle stream) {
  const ArgCheck check_x(kOp, "x", x);
  check_x.on_cuda().dtype({DataType::kBFloat16, DataType::kFloat32}).shape({kAny, kAny}).strides({kAny, 1}).aligned(16);
  const int64_t num_rows = x.shape[0], num_columns = x.shape[1];
  if (num_columns % 16 != 0) check_x.fail("must have a multiple of 16 columns", std::to_string(num_columns));
  check_x.stride_multiple_of(0, x.dtype == DataType::kBFloat16 ? 8 : 4);
  ArgCheck(kOp, "data", data)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat8E4M3, DataType::kUInt8})
      .shape({num_rows, num_columns})
      .strides({num_columns, 1})
      .aligned(16);
  ArgCheck(kOp, "scale", scale)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({num_rows, ceil_div(num_columns, kTile)})
      .strides({1, kAny})
      .stride_multiple_of(1, 4)
      .stride_at_least(1, num_rows)
      .aligned(16);
  if (data_t.has_value() != scale_t.has_value()) {
    throw pybind11::value_error("quantize_1x128: data_t and scale_t must be given together, got one of them");
  }

  Quantize1x128Params params{};
  params.x = x.data;
  params.data = static_cast<uint8_t*>(data.data);
  params.scale = static_cast<float*>(scale.data);
  params.x_stride = x.strides[0];
  // Along an axis of one tile a framework may report any stride; rows of scales are padded to whole float4 in any case.
  params.scale_stride = scale.strides[1];
  params.num_rows = num_rows;
  params.num_columns = static_cast<int>(num_columns);
  params.input = x.dtype == DataType::kBFloat16 ? QuantInput::kBFloat16 : QuantInput::kFloat32;
  params.pow2_scales = pow2_scales;
  params.device = x.device.index;
  if (data_t) check_transposed(params, x, *data_t, *scale_t);
  throw_on_error(kOp, quantize_1x128(params, stream_for(kOp, x, stream)));
}

}  // namespace

void bind_quant(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("quantize_1x128", &bound_quantize_1x128, py::arg("x"), py::arg("data"), py::arg("scale"), py::kw_only(),
             py::arg("data_t") = py::none(), py::arg("scale_t") = py::none(), py::arg("pow2_scales") = false,
             py::arg("stream") = py::none(),
             "Writes the quantised x into data and scale (and x transposed into data_t and scale_t), on a stream. Each "
             "column of scale needs room for round_up(rows, 4) numbers: the pad is written too.");
}

}  // namespace dsv3rt
