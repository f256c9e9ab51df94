#include "embed/bind.h"

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "embed/params.h"

namespace dsv3rt {
namespace {

namespace py = pybind11;

HeadRows head_rows(const char* name, const TensorView& view, const TensorView& x) {
  ArgCheck("rope", name, view)
      .on_device_of(x, "x")
      .dtype({DataType::kBFloat16})
      .shape({x.shape[0], x.shape[1], x.shape[2]})
      .strides({kAny, kAny, 1})
      .stride_multiple_of(0, 8)
      .stride_multiple_of(1, 8)
      .aligned(16);
  return {view.data, view.strides[0], view.strides[1]};
}

const float* table(const char* name, const TensorView& view, const TensorView& x) {
  const int64_t pairs = x.shape[2] / 2;
  ArgCheck("rope", name, view)
      .on_device_of(x, "x")
      .dtype({DataType::kFloat32})
      .shape({x.shape[0], pairs})
      .strides({pairs, 1})
      .aligned(16);
  return static_cast<const float*>(view.data);
}

void bound_rope(const TensorView& x, const TensorView& y, const TensorView& cos, const TensorView& sin, bool inverse,
                py::handle stream) {
  const ArgCheck check_x("rope", "x", x);
  check_x.on_cuda().shape({kAny, kAny, kAny});
  if (x.shape[2] % 8 != 0) check_x.fail("must have a multiple of 8 columns", std::to_string(x.shape[2]));
  RopeParams params{};
  params.x = head_rows("x", x, x);
  params.y = head_rows("y", y, x);
  ArgCheck("rope", "y", y).stride_at_least(0, 8).stride_at_least(1, 8);
  params.cos = table("cos", cos, x);
  params.sin = table("sin", sin, x);
  params.num_tokens = x.shape[0];
  params.num_heads = static_cast<int>(x.shape[1]);
  params.num_columns = static_cast<int>(x.shape[2]);
  params.inverse = inverse;
  params.device = x.device.index;
  throw_on_error("rope", rope(params, stream_for("rope", x, stream)));
}

void bound_embedding_backward(const TensorView& grad, const TensorView& order, const TensorView& tokens,
                              const TensorView& offsets, const TensorView& weight_grad, py::handle stream) {
  constexpr char kOp[] = "embedding_backward";
  const ArgCheck check_grad(kOp, "grad", grad);
  check_grad.on_cuda().dtype({DataType::kBFloat16}).shape({kAny, kAny}).strides({kAny, 1});
  check_grad.stride_multiple_of(0, 8).aligned(16);
  const int64_t columns = grad.shape[1];
  if (columns % 8 != 0) check_grad.fail("must have a multiple of 8 columns", std::to_string(columns));
  ArgCheck(kOp, "weight_grad", weight_grad)
      .on_device_of(grad, "grad")
      .dtype({DataType::kBFloat16})
      .shape({kAny, columns})
      .strides({columns, 1})
      .aligned(16);
  const int64_t rows = weight_grad.shape[0];
  const auto vector = [&](const char* name, const TensorView& view, DataType dtype, int64_t size) {
    ArgCheck(kOp, name, view).on_device_of(grad, "grad").dtype({dtype}).shape({size}).strides({1});
  };
  vector("order", order, DataType::kInt64, grad.shape[0]);
  vector("tokens", tokens, DataType::kInt32, grad.shape[0]);
  vector("offsets", offsets, DataType::kInt32, rows + 1);
  EmbeddingBackwardParams params{};
  params.grad = grad.data;
  params.order = static_cast<const int64_t*>(order.data);
  params.tokens = static_cast<const int32_t*>(tokens.data);
  params.offsets = static_cast<const int32_t*>(offsets.data);
  params.weight_grad = weight_grad.data;
  params.grad_stride = grad.strides[0];
  params.num_tokens = grad.shape[0];
  params.num_rows = rows;
  params.num_columns = static_cast<int>(columns);
  params.device = grad.device.index;
  throw_on_error(kOp, embedding_backward(params, stream_for(kOp, grad, stream)));
}

}  // namespace

void bind_embed(py::module_& module) {
  const auto none = py::none();
  module.def("rope", &bound_rope, py::arg("x"), py::arg("y"), py::arg("cos"), py::arg("sin"), py::kw_only(),
             py::arg("inverse") = false, py::arg("stream") = none,
             "Writes the pairs of x (T, H, R), turned by their angles, into y, which may be x, on a stream.");
  module.def("embedding_backward", &bound_embedding_backward, py::arg("grad"), py::arg("order"), py::arg("tokens"),
             py::arg("offsets"), py::arg("weight_grad"), py::kw_only(), py::arg("stream") = none,
             "Writes the sums of the rows of grad that each row of the table was looked up for, on a stream; order "
             "holds the rows of grad sorted by token, tokens the sorted tokens, offsets where each token's begin.");
}

}  // namespace dsv3rt
