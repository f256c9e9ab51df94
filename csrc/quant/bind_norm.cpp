#include "quant/bind.h"
#include "quant/bind_checks.h"

namespace dsv3rt {
namespace {

struct Rows {
  void* data;
  int64_t stride;
};

// BF16 rows of x's shape that kernels read 16 bytes at a time.
Rows rows_like(const char* op, const char* name, const TensorView& view, const TensorView& x) {
  const ArgCheck check(op, name, view);
  check.on_device_of(x, "x").dtype({DataType::kBFloat16});
  check_rows(check, view);
  check.shape({x.shape[0], x.shape[1]});
  return {view.data, view.strides[0]};
}

void* contiguous_like(const char* op, const char* name, const TensorView& view, const TensorView& x) {
  ArgCheck(op, name, view)
      .on_device_of(x, "x")
      .dtype({DataType::kBFloat16})
      .shape({x.shape[0], x.shape[1]})
      .strides({x.shape[1], 1})
      .aligned(16);
  return view.data;
}

float* statistics(const char* op, const TensorView& rstd, const TensorView& x) {
  ArgCheck(op, "rstd", rstd).on_device_of(x, "x").dtype({DataType::kFloat32}).shape({x.shape[0]}).strides({1});
  return static_cast<float*>(rstd.data);
}

void check_width(const char* op, const TensorView& x) {
  const ArgCheck check_x(op, "x", x);
  check_x.on_cuda().shape({kAny, kAny});
  const int64_t columns = x.shape[1];
  if (columns % 8 != 0 || columns < kMinNormColumns || columns > kMaxNormColumns) {
    check_x.fail("must have a multiple of 8 columns, " + std::to_string(kMinNormColumns) + " to " +
                     std::to_string(kMaxNormColumns),
                 std::to_string(columns));
  }
}

const void* weight_of(const char* op, const TensorView& weight, const TensorView& x) {
  ArgCheck(op, "weight", weight)
      .on_device_of(x, "x")
      .dtype({DataType::kBFloat16, DataType::kFloat32})
      .shape({x.shape[1]})
      .strides({1})
      .aligned(16);
  return weight.data;
}

NormParams norm_of(const char* op, const TensorView& x, const TensorView& weight, const TensorView& rstd, float eps) {
  check_width(op, x);
  const Rows rows = rows_like(op, "x", x, x);
  NormParams params{};
  params.x = rows.data;
  params.x_stride = rows.stride;
  params.weight = weight_of(op, weight, x);
  params.weight_type = input_of(weight.dtype);
  params.rstd = statistics(op, rstd, x);
  params.eps = eps;
  params.inverse_columns = 1.0f / static_cast<float>(x.shape[1]);
  params.out.num_rows = x.shape[0];
  params.out.num_columns = static_cast<int>(x.shape[1]);
  params.device = x.device.index;
  return params;
}

void bound_rms_norm(const TensorView& x, const TensorView& weight, const TensorView& y, const TensorView& rstd,
                    float eps, py::handle stream) {
  constexpr char kOp[] = "rms_norm";
  NormParams params = norm_of(kOp, x, weight, rstd, eps);
  params.y = contiguous_like(kOp, "y", y, x);
  throw_on_error(kOp, rms_norm(params, stream_for(kOp, x, stream)));
}

void bound_rms_norm_quantize_1x128(const TensorView& x, const TensorView& weight, const TensorView& rstd,
                                   const TensorView& data, const TensorView& scale, float eps,
                                   const OptionalView& residual, const OptionalView& sum, const OptionalView& y,
                                   const OptionalView& data_t, const OptionalView& scale_t, bool pow2_scales,
                                   py::handle stream) {
  constexpr char kOp[] = "rms_norm_quantize_1x128";
  NormParams params = norm_of(kOp, x, weight, rstd, eps);
  const int64_t num_rows = x.shape[0], num_columns = x.shape[1];
  if (num_columns % 16 != 0)
    ArgCheck(kOp, "x", x).fail("must have a multiple of 16 columns", std::to_string(num_columns));
  params.out = output_of(kOp, x, num_rows, num_columns, data, scale, pow2_scales);
  both_or_none(kOp, "residual and sum", residual.has_value(), sum.has_value());
  if (residual) {
    const Rows rows = rows_like(kOp, "residual", *residual, x);
    params.residual = rows.data;
    params.residual_stride = rows.stride;
    params.sum = contiguous_like(kOp, "sum", *sum, x);
  }
  if (y) params.y = contiguous_like(kOp, "y", *y, x);
  both_or_none(kOp, "data_t and scale_t", data_t.has_value(), scale_t.has_value());
  if (data_t) {
    set_transposed(kOp, "", x, num_rows, num_columns, *data_t, *scale_t, params.out.data_t, params.out.scale_t,
                   params.out.scale_t_stride);
  }
  throw_on_error(kOp, rms_norm(params, stream_for(kOp, x, stream)));
}

void bound_rms_norm_backward(const TensorView& grad, const TensorView& x, const TensorView& weight,
                             const TensorView& rstd, const TensorView& dx, const TensorView& weight_grad,
                             const TensorView& weight_parts, const OptionalView& grad_residual, py::handle stream) {
  constexpr char kOp[] = "rms_norm_backward";
  check_width(kOp, x);
  const Rows x_rows = rows_like(kOp, "x", x, x), grad_rows = rows_like(kOp, "grad", grad, x);
  NormBackwardParams params{};
  params.x = x_rows.data;
  params.x_stride = x_rows.stride;
  params.grad = grad_rows.data;
  params.grad_stride = grad_rows.stride;
  if (grad_residual) {
    const Rows rows = rows_like(kOp, "grad_residual", *grad_residual, x);
    params.grad_residual = rows.data;
    params.grad_residual_stride = rows.stride;
  }
  params.weight = weight_of(kOp, weight, x);
  params.weight_type = input_of(weight.dtype);
  params.rstd = statistics(kOp, rstd, x);
  params.dx = contiguous_like(kOp, "dx", dx, x);
  ArgCheck(kOp, "weight_grad", weight_grad)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({x.shape[1]})
      .strides({1})
      .aligned(16);
  params.weight_grad = static_cast<float*>(weight_grad.data);
  ArgCheck(kOp, "weight_parts", weight_parts)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({kAny, x.shape[1]})
      .strides({x.shape[1], 1})
      .aligned(16);
  if (x.shape[0] > 0 && weight_parts.shape[0] == 0) {
    throw py::value_error(std::string(kOp) + ": weight_parts must have a row, got none");
  }
  params.weight_parts = static_cast<float*>(weight_parts.data);
  params.num_parts = static_cast<int>(weight_parts.shape[0]);
  params.num_rows = x.shape[0];
  params.num_columns = static_cast<int>(x.shape[1]);
  params.device = x.device.index;
  throw_on_error(kOp, rms_norm_backward(params, stream_for(kOp, x, stream)));
}

}  // namespace

void bind_norm(py::module_& module) {
  const auto none = py::none();
  module.def("rms_norm", &bound_rms_norm, py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("rstd"), py::kw_only(),
             py::arg("eps"), py::arg("stream") = none,
             "Writes the normed rows of x into y and 1 / sqrt(mean(square) + eps) into rstd, on a stream.");
  module.def("rms_norm_quantize_1x128", &bound_rms_norm_quantize_1x128, py::arg("x"), py::arg("weight"),
             py::arg("rstd"), py::arg("data"), py::arg("scale"), py::kw_only(), py::arg("eps"),
             py::arg("residual") = none, py::arg("sum") = none, py::arg("y") = none, py::arg("data_t") = none,
             py::arg("scale_t") = none, py::arg("pow2_scales") = false, py::arg("stream") = none,
             "Writes the normed rows of x, or of x + residual, quantised, into data and scale (and transposed into "
             "data_t and scale_t), on a stream; on request also the sum and the normed rows.");
  module.def("rms_norm_backward", &bound_rms_norm_backward, py::arg("grad"), py::arg("x"), py::arg("weight"),
             py::arg("rstd"), py::arg("dx"), py::arg("weight_grad"), py::arg("weight_parts"), py::kw_only(),
             py::arg("grad_residual") = none, py::arg("stream") = none,
             "Writes the gradients of x and of the weight, on a stream; weight_parts is scratch, a row for each block "
             "of rows.");
}

}  // namespace dsv3rt
