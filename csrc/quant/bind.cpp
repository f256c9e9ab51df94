#include "quant/bind.h"

#include "quant/bind_checks.h"

namespace dsv3rt {
namespace {

namespace py = pybind11;

RowGroups groups_of(const char* op, const TensorView& x, const OptionalView& counts, const OptionalView& offsets) {
  both_or_none(op, "counts and offsets", counts.has_value(), offsets.has_value());
  if (!counts) return {};
  ArgCheck(op, "counts", *counts).on_device_of(x, "x").dtype({DataType::kInt32}).shape({kAny}).strides({1});
  const int64_t num_groups = counts->shape[0];
  ArgCheck(op, "offsets", *offsets).on_device_of(x, "x").dtype({DataType::kInt32}).shape({num_groups + 1}).strides({1});
  return {static_cast<const int*>(counts->data), static_cast<const int*>(offsets->data), static_cast<int>(num_groups)};
}

GateUpInput gate_up_of(const char* op, const TensorView& x, const OptionalView& x_scale, const OptionalView& weight) {
  const ArgCheck check_x(op, "x", x);
  check_x.on_cuda().dtype({DataType::kBFloat16, DataType::kFloat8E4M3, DataType::kUInt8});
  check_rows(check_x, x);
  if (x.shape[1] % 32 != 0) {
    check_x.fail("must have a multiple of 32 columns, gate and up", std::to_string(x.shape[1]));
  }
  GateUpInput in{};
  in.data = x.data;
  in.stride = x.strides[0];
  in.hidden = static_cast<int>(x.shape[1] / 2);
  in.type = input_of(x.dtype);
  if ((in.type == QuantInput::kFloat8) != x_scale.has_value()) {
    throw py::value_error(std::string(op) + ": x_scale must be given with FP8 and only then, got " +
                          (x_scale ? "it with BF16" : "none"));
  }
  if (x_scale) {
    check_row_scales(op, "x_scale", *x_scale, x, x.shape[0], x.shape[1]);
    in.scale = static_cast<const float*>(x_scale->data);
    in.scale_stride = x_scale->strides[1];
  }
  if (weight) {
    ArgCheck(op, "weight", *weight).on_device_of(x, "x").dtype({DataType::kFloat32}).shape({x.shape[0]}).strides({1});
    in.weight = static_cast<const float*>(weight->data);
  }
  return in;
}

void bound_quantize_1x128(const TensorView& x, const TensorView& data, const TensorView& scale,
                          const OptionalView& data_t, const OptionalView& scale_t, const OptionalView& counts,
                          const OptionalView& offsets, const OptionalView& rows, bool pow2_scales, py::handle stream) {
  constexpr char kOp[] = "quantize_1x128";
  const ArgCheck check_x(kOp, "x", x);
  check_x.on_cuda().dtype({DataType::kBFloat16, DataType::kFloat32});
  check_rows(check_x, x);
  const int64_t num_rows = rows ? rows->shape[0] : x.shape[0], num_columns = x.shape[1];
  if (num_columns % 16 != 0) check_x.fail("must have a multiple of 16 columns", std::to_string(num_columns));
  both_or_none(kOp, "data_t and scale_t", data_t.has_value(), scale_t.has_value());

  Quantize1x128Params params{};
  params.x = x.data;
  params.x_stride = x.strides[0];
  params.input = input_of(x.dtype);
  params.groups = groups_of(kOp, x, counts, offsets);
  if (rows) {
    check_x.dtype({DataType::kBFloat16});
    const ArgCheck check_index(kOp, "rows", *rows);
    check_index.on_device_of(x, "x").dtype({DataType::kInt32}).shape({kAny}).strides({1}).aligned(16);
    if (num_rows % kTile != 0) check_index.fail("must have a multiple of 128 entries", std::to_string(num_rows));
    if (!counts) check_index.fail("must come with counts and offsets", "none");
    params.rows = static_cast<const int*>(rows->data);
  }
  params.out = output_of(kOp, x, num_rows, num_columns, data, scale, pow2_scales);
  params.device = x.device.index;
  if (data_t) {
    set_transposed(kOp, "", x, num_rows, num_columns, *data_t, *scale_t, params.out.data_t, params.out.scale_t,
                   params.out.scale_t_stride);
  }
  throw_on_error(kOp, quantize_1x128(params, stream_for(kOp, x, stream)));
}

// Scales (matrices, first, second) of 128x128 tiles, contiguous.
float* block_scales(const char* op, const char* name, const TensorView& scales, const TensorView& like,
                    int64_t matrices, int64_t first, int64_t second) {
  ArgCheck(op, name, scales)
      .on_device_of(like, "the first")
      .dtype({DataType::kFloat32})
      .shape({matrices, first, second})
      .strides({first * second, second, 1});
  return static_cast<float*>(scales.data);
}

void bound_transpose_128x128(const TensorView& data, const TensorView& scale, const TensorView& data_t,
                             const TensorView& scale_t, py::handle stream) {
  constexpr char kOp[] = "transpose_128x128";
  ArgCheck(kOp, "data", data).on_cuda().shape({kAny, kAny, kAny});
  const int64_t matrices = data.shape[0], rows = data.shape[1], columns = data.shape[2];
  const int64_t row_tiles = ceil_div(rows, kTile), column_tiles = ceil_div(columns, kTile);
  check_codes(kOp, "data", data, data, {matrices, rows, columns}, {rows * columns, columns, 1}, 1);
  check_codes(kOp, "data_t", data_t, data, {matrices, columns, rows}, {rows * columns, rows, 1}, 16);
  Transpose128x128Params params{};
  params.data = static_cast<const uint8_t*>(data.data);
  params.scale = block_scales(kOp, "scale", scale, data, matrices, row_tiles, column_tiles);
  params.data_t = static_cast<uint8_t*>(data_t.data);
  params.scale_t = block_scales(kOp, "scale_t", scale_t, data, matrices, column_tiles, row_tiles);
  params.num_matrices = static_cast<int>(matrices);
  params.num_rows = static_cast<int>(rows);
  params.num_columns = static_cast<int>(columns);
  params.vectorised = rows % 16 == 0 && columns % 16 == 0 && reinterpret_cast<uintptr_t>(data.data) % 16 == 0;
  params.device = data.device.index;
  throw_on_error(kOp, transpose_128x128(params, stream_for(kOp, data, stream)));
}

void bound_quantize_128x128(const TensorView& w, const TensorView& data, const TensorView& scale,
                            const OptionalView& data_t, const OptionalView& scale_t, bool pow2_scales,
                            py::handle stream) {
  constexpr char kOp[] = "quantize_128x128";
  ArgCheck(kOp, "w", w)
      .on_cuda()
      .dtype({DataType::kBFloat16, DataType::kFloat32})
      .shape({kAny, kAny, kAny})
      .strides({kAny, kAny, 1});
  const int64_t matrices = w.shape[0], rows = w.shape[1], columns = w.shape[2];
  const int64_t row_tiles = ceil_div(rows, kTile), column_tiles = ceil_div(columns, kTile);
  check_codes(kOp, "data", data, w, {matrices, rows, columns}, {rows * columns, columns, 1}, 16);
  both_or_none(kOp, "data_t and scale_t", data_t.has_value(), scale_t.has_value());

  Quantize128x128Params params{};
  params.w = w.data;
  params.data = static_cast<uint8_t*>(data.data);
  params.scale = block_scales(kOp, "scale", scale, w, matrices, row_tiles, column_tiles);
  if (data_t) {
    check_codes(kOp, "data_t", *data_t, w, {matrices, columns, rows}, {rows * columns, rows, 1}, 16);
    params.data_t = static_cast<uint8_t*>(data_t->data);
    params.scale_t = block_scales(kOp, "scale_t", *scale_t, w, matrices, column_tiles, row_tiles);
  }
  params.batch_stride = w.strides[0];
  params.row_stride = w.strides[1];
  params.num_matrices = static_cast<int>(matrices);
  params.num_rows = static_cast<int>(rows);
  params.num_columns = static_cast<int>(columns);
  params.input = input_of(w.dtype);
  params.scale_mask = pow2_scales ? kPow2ScaleMask : 0;
  const int64_t alignment = alignment_in_elements(w.dtype);
  params.vectorised = columns % 8 == 0 && (!data_t || rows % 16 == 0) && params.row_stride % alignment == 0 &&
                      params.batch_stride % alignment == 0 && reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
  params.device = w.device.index;
  throw_on_error(kOp, quantize_128x128(params, stream_for(kOp, w, stream)));
}

void bound_swiglu_quantize_1x128(const TensorView& x, const TensorView& data, const TensorView& scale,
                                 const OptionalView& x_scale, const OptionalView& weight, const OptionalView& data_t,
                                 const OptionalView& scale_t, const OptionalView& counts, const OptionalView& offsets,
                                 bool pow2_scales, py::handle stream) {
  constexpr char kOp[] = "swiglu_quantize_1x128";
  both_or_none(kOp, "data_t and scale_t", data_t.has_value(), scale_t.has_value());
  SwigluParams params{};
  params.in = gate_up_of(kOp, x, x_scale, weight);
  params.groups = groups_of(kOp, x, counts, offsets);
  params.out = output_of(kOp, x, x.shape[0], params.in.hidden, data, scale, pow2_scales);
  params.device = x.device.index;
  if (data_t) {
    set_transposed(kOp, "", x, x.shape[0], params.in.hidden, *data_t, *scale_t, params.out.data_t, params.out.scale_t,
                   params.out.scale_t_stride);
  }
  throw_on_error(kOp, swiglu_quantize_1x128(params, stream_for(kOp, x, stream)));
}

void bound_swiglu_backward_quantize_1x128(const TensorView& x, const TensorView& grad, const TensorView& data,
                                          const TensorView& scale, const TensorView& data_t, const TensorView& scale_t,
                                          const OptionalView& x_scale, const OptionalView& weight,
                                          const OptionalView& output_data_t, const OptionalView& output_scale_t,
                                          const OptionalView& weight_grad, const OptionalView& counts,
                                          const OptionalView& offsets, bool pow2_scales, py::handle stream) {
  constexpr char kOp[] = "swiglu_backward_quantize_1x128";
  SwigluBackwardParams params{};
  params.in = gate_up_of(kOp, x, x_scale, weight);
  const int64_t num_rows = x.shape[0], hidden = params.in.hidden;
  if (hidden % kTile != 0) {
    ArgCheck(kOp, "x", x).fail("must have a multiple of 256 columns, gate and up", std::to_string(x.shape[1]));
  }
  const ArgCheck check_grad(kOp, "grad", grad);
  check_grad.on_device_of(x, "x").dtype({DataType::kBFloat16});
  check_rows(check_grad, grad);
  check_grad.shape({num_rows, hidden});
  params.grad = grad.data;
  params.grad_stride = grad.strides[0];
  params.groups = groups_of(kOp, x, counts, offsets);
  params.out = output_of(kOp, x, num_rows, 2 * hidden, data, scale, pow2_scales);
  set_transposed(kOp, "", x, num_rows, 2 * hidden, data_t, scale_t, params.out.data_t, params.out.scale_t,
                 params.out.scale_t_stride);
  both_or_none(kOp, "output_data_t and output_scale_t", output_data_t.has_value(), output_scale_t.has_value());
  if (output_data_t) {
    set_transposed(kOp, "output_", x, num_rows, hidden, *output_data_t, *output_scale_t, params.output_t,
                   params.output_scale_t, params.output_scale_t_stride);
  }
  both_or_none(kOp, "weight and weight_grad", weight.has_value(), weight_grad.has_value());
  if (weight_grad) {
    ArgCheck(kOp, "weight_grad", *weight_grad)
        .on_device_of(x, "x")
        .dtype({DataType::kFloat32})
        .shape({hidden / kTile, num_rows})
        .strides({num_rows, 1});
    params.weight_grad = static_cast<float*>(weight_grad->data);
  }
  params.device = x.device.index;
  throw_on_error(kOp, swiglu_backward_quantize_1x128(params, stream_for(kOp, x, stream)));
}

}  // namespace

void bind_quant(py::module_& module) {
  const auto none = py::none();
  module.def(
      "quantize_1x128", &bound_quantize_1x128, py::arg("x"), py::arg("data"), py::arg("scale"), py::kw_only(),
      py::arg("data_t") = none, py::arg("scale_t") = none, py::arg("counts") = none, py::arg("offsets") = none,
      py::arg("rows") = none, py::arg("pow2_scales") = false, py::arg("stream") = none,
      "Writes the quantised x, or its rows as `rows` lists them, into data and scale (and transposed into data_t "
      "and scale_t), on a stream.");
  module.def(
      "quantize_128x128", &bound_quantize_128x128, py::arg("w"), py::arg("data"), py::arg("scale"), py::kw_only(),
      py::arg("data_t") = none, py::arg("scale_t") = none, py::arg("pow2_scales") = false, py::arg("stream") = none,
      "Writes the matrices w (X, F, D), quantised by blocks, into data and scale (and transposed into data_t and "
      "scale_t), on a stream.");
  module.def("transpose_128x128", &bound_transpose_128x128, py::arg("data"), py::arg("scale"), py::arg("data_t"),
             py::arg("scale_t"), py::kw_only(), py::arg("stream") = none,
             "Writes the transposed matrices of data (X, F, D) and their scales into data_t and scale_t, on a stream.");
  module.def("swiglu_quantize_1x128", &bound_swiglu_quantize_1x128, py::arg("x"), py::arg("data"), py::arg("scale"),
             py::kw_only(), py::arg("x_scale") = none, py::arg("weight") = none, py::arg("data_t") = none,
             py::arg("scale_t") = none, py::arg("counts") = none, py::arg("offsets") = none,
             py::arg("pow2_scales") = false, py::arg("stream") = none,
             "Writes the quantised silu(gate) * up of x = (gate, up) into data and scale (and transposed into data_t "
             "and scale_t), on a stream.");
  module.def(
      "swiglu_backward_quantize_1x128", &bound_swiglu_backward_quantize_1x128, py::arg("x"), py::arg("grad"),
      py::arg("data"), py::arg("scale"), py::arg("data_t"), py::arg("scale_t"), py::kw_only(),
      py::arg("x_scale") = none, py::arg("weight") = none, py::arg("output_data_t") = none,
      py::arg("output_scale_t") = none, py::arg("weight_grad") = none, py::arg("counts") = none,
      py::arg("offsets") = none, py::arg("pow2_scales") = false, py::arg("stream") = none,
      "Writes the quantised gradient of x = (gate, up) into data and scale, and transposed into data_t and "
      "scale_t, on a stream; on request also the product transposed, and partial sums of the weights' gradient.");
  bind_norm(module);
}

}  // namespace dsv3rt
