#include "optim/bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "common/math.h"
#include "optim/params.h"

namespace dsv3rt {
namespace {

namespace py = pybind11;

using Views = std::vector<TensorView>;
using Keys = std::vector<std::pair<uint32_t, uint32_t>>;

OptimType type_of(const Views& views) {
  if (views.empty()) return OptimType::kNone;
  return views.front().dtype == DataType::kBFloat16 ? OptimType::kBFloat16 : OptimType::kFloat32;
}

void check_contiguous(const ArgCheck& check, const TensorView& view) {
  int64_t stride = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    if (view.shape[axis] > 1 && view.strides[axis] != stride && view.num_elements() > 0) {
      check.fail("must be contiguous",
                 "stride " + std::to_string(view.strides[axis]) + " along axis " + std::to_string(axis));
    }
    stride *= view.shape[axis];
  }
}

// Contiguous arrays of one dtype on one device.
void check_list(const char* op, const char* name, const Views& views, const TensorView& like) {
  for (const TensorView& view : views) {
    const ArgCheck check(op, name, view);
    check.on_cuda().on_device_of(like, "the first").dtype({DataType::kBFloat16, DataType::kFloat32});
    check.dtype({views.front().dtype});
    check_contiguous(check, view);
  }
}

void check_like(const char* op, const char* name, const Views& views, const Views& masters) {
  if (views.size() != masters.size()) {
    throw py::value_error(std::string(op) + ": " + name + " must be as many as masters, " +
                          std::to_string(masters.size()) + ", got " + std::to_string(views.size()));
  }
  if (views.empty()) return;
  check_list(op, name, views, masters.front());
  for (size_t i = 0; i < views.size(); ++i) {
    if (views[i].num_elements() != masters[i].num_elements()) {
      ArgCheck(op, name, views[i])
          .fail("must have the " + std::to_string(masters[i].num_elements()) + " elements of its master",
                std::to_string(views[i].num_elements()));
    }
  }
}

AdamWNumbers numbers_of(const char* op, const std::vector<float>& numbers) {
  if (numbers.size() != 8) {
    throw py::value_error(std::string(op) + ": numbers must be 8, got " + std::to_string(numbers.size()));
  }
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7]};
}

// What both forms of the step check and pass on alike.
void check_state(const char* op, const Views& masters, const Views& grads, const Views& m, const Views& v,
                 const Keys& keys) {
  for (const TensorView& master : masters) ArgCheck(op, "masters", master).dtype({DataType::kFloat32});
  check_list(op, "masters", masters, masters.front());
  check_like(op, "grads", grads, masters);
  check_like(op, "m", m, masters);
  check_like(op, "v", v, masters);
  for (const TensorView& view : v) ArgCheck(op, "v", view).dtype({m.front().dtype});
  if (!keys.empty() && keys.size() != masters.size()) {
    throw py::value_error(std::string(op) + ": keys must be none or as many as masters, " +
                          std::to_string(masters.size()) + ", got " + std::to_string(keys.size()));
  }
}

const float* scale_of(const char* op, const std::optional<TensorView>& grad_scale, const TensorView& like) {
  if (!grad_scale) return nullptr;
  const ArgCheck check(op, "grad_scale", *grad_scale);
  check.on_device_of(like, "masters").dtype({DataType::kFloat32});
  if (grad_scale->num_elements() != 1) check.fail("must be one number", std::to_string(grad_scale->num_elements()));
  return static_cast<const float*>(grad_scale->data);
}

void bound_adamw_step(const Views& masters, const Views& grads, const Views& m, const Views& v, const Views& params,
                      const Keys& keys, const std::vector<float>& numbers, const std::optional<TensorView>& grad_scale,
                      py::handle stream) {
  constexpr char kOp[] = "adamw_step";
  if (masters.empty()) return;
  check_state(kOp, masters, grads, m, v, keys);
  if (!params.empty()) check_like(kOp, "params", params, masters);
  const auto launch = std::make_unique<AdamWParams>();
  launch->numbers = numbers_of(kOp, numbers);
  launch->grad_scale = scale_of(kOp, grad_scale, masters.front());
  launch->grad = type_of(grads);
  launch->moment = type_of(m);
  launch->param = type_of(params);
  launch->stochastic = !keys.empty();
  void* cuda_stream = stream_for(kOp, masters.front(), stream);
  for (size_t start = 0; start < masters.size(); start += kMaxAdamWTensors) {
    launch->num_tensors = static_cast<int>(std::min<size_t>(kMaxAdamWTensors, masters.size() - start));
    for (int slot = 0; slot < launch->num_tensors; ++slot) {
      const size_t i = start + slot;
      AdamWTensor& tensor = launch->tensors[slot];
      tensor.master = static_cast<float*>(masters[i].data);
      tensor.grad = grads[i].data;
      tensor.m = m[i].data;
      tensor.v = v[i].data;
      tensor.param = params.empty() ? nullptr : params[i].data;
      tensor.num_elements = masters[i].num_elements();
      if (!keys.empty()) tensor.key = {keys[i].first, keys[i].second};
    }
    throw_on_error(kOp, adamw_step(*launch, masters.front().device.index, cuda_stream));
  }
}

void check_count(const char* op, const char* name, const Views& views, size_t count) {
  if (views.size() != count) {
    throw py::value_error(std::string(op) + ": " + name + " must be " + std::to_string(count) + ", got " +
                          std::to_string(views.size()));
  }
}

// The FP8 form (X, R, C) of a tensor, or the transposed one (X, C, R): where it lies, and how far its rows are apart,
// which follow each other over all matrices.
struct CastViews {
  uint8_t* data;
  float* scale;
  int64_t data_stride, scale_stride;
};

CastViews cast_of(const char* op, const char* name, const TensorView& data, const TensorView& scale,
                  const TensorView& master, int64_t rows, int64_t columns) {
  const int64_t row_tiles = ceil_div(rows, int64_t(128)), column_tiles = ceil_div(columns, int64_t(128));
  const auto stride_of = [&](const ArgCheck& check, const TensorView& view, int64_t row_count, int64_t width) {
    const int64_t stride = view.shape[1] > 1 ? view.strides[1] : width;
    check.strides({row_count * stride, kAny, 1}).stride_at_least(1, width);
    return stride;
  };
  const ArgCheck check_data(op, name, data), check_scale(op, name, scale);
  check_data.on_device_of(master, "masters").dtype({DataType::kUInt8}).shape({kAny, rows, columns});
  check_scale.on_device_of(master, "masters").dtype({DataType::kFloat32}).shape({kAny, row_tiles, column_tiles});
  if (data.shape[0] * rows * columns != master.num_elements() || scale.shape[0] != data.shape[0]) {
    check_data.fail("must have the " + std::to_string(master.num_elements()) + " elements of its master",
                    std::to_string(data.num_elements()));
  }
  return {static_cast<uint8_t*>(data.data), static_cast<float*>(scale.data), stride_of(check_data, data, rows, columns),
          stride_of(check_scale, scale, row_tiles, column_tiles)};
}

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

void bound_adamw_step_fp8(const Views& masters, const Views& grads, const Views& m, const Views& v, const Views& data,
                          const Views& scale, const Views& data_t, const Views& scale_t, const Keys& keys,
                          const std::vector<float>& numbers, const std::optional<TensorView>& grad_scale,
                          py::handle stream) {
  constexpr char kOp[] = "adamw_step_fp8";
  if (masters.empty()) return;
  check_state(kOp, masters, grads, m, v, keys);
  check_count(kOp, "data", data, masters.size());
  check_count(kOp, "scale", scale, masters.size());
  if (!data_t.empty()) check_count(kOp, "data_t", data_t, masters.size());
  check_count(kOp, "scale_t", scale_t, data_t.size());
  const auto launch = std::make_unique<AdamWFp8Params>();
  launch->numbers = numbers_of(kOp, numbers);
  launch->grad_scale = scale_of(kOp, grad_scale, masters.front());
  launch->grad = type_of(grads);
  launch->moment = type_of(m);
  launch->stochastic = !keys.empty();
  void* cuda_stream = stream_for(kOp, masters.front(), stream);
  for (size_t start = 0; start < masters.size(); start += kMaxAdamWFp8Tensors) {
    launch->num_tensors = static_cast<int>(std::min<size_t>(kMaxAdamWFp8Tensors, masters.size() - start));
    for (int slot = 0; slot < launch->num_tensors; ++slot) {
      const size_t i = start + slot;
      ArgCheck(kOp, "data", data[i]).shape({kAny, kAny, kAny});
      const int64_t rows = data[i].shape[1], columns = data[i].shape[2];
      const CastViews cast = cast_of(kOp, "data", data[i], scale[i], masters[i], rows, columns);
      if (cast.data_stride != columns || cast.scale_stride != ceil_div(columns, int64_t(128))) {
        ArgCheck(kOp, "data", data[i]).fail("must be contiguous, as its scales", std::to_string(cast.data_stride));
      }
      AdamWFp8Tensor tensor{};
      tensor.master = static_cast<float*>(masters[i].data);
      tensor.grad = grads[i].data;
      tensor.m = m[i].data;
      tensor.v = v[i].data;
      tensor.data = cast.data;
      tensor.scale = cast.scale;
      tensor.num_matrices = static_cast<int>(data[i].shape[0]);
      tensor.num_rows = static_cast<int>(rows);
      tensor.num_columns = static_cast<int>(columns);
      tensor.vectorised = columns % 8 == 0 && aligned(tensor.master, 16) && aligned(tensor.grad, 16) &&
                          aligned(tensor.m, 16) && aligned(tensor.v, 16) && aligned(tensor.data, 8);
      if (!data_t.empty()) {
        const CastViews cast_t = cast_of(kOp, "data_t", data_t[i], scale_t[i], masters[i], columns, rows);
        tensor.data_t = cast_t.data;
        tensor.scale_t = cast_t.scale;
        tensor.data_t_stride = cast_t.data_stride;
        tensor.scale_t_stride = cast_t.scale_stride;
        tensor.vectorised =
            tensor.vectorised && rows % 16 == 0 && cast_t.data_stride % 16 == 0 && aligned(tensor.data_t, 16);
      }
      if (!keys.empty()) tensor.key = {keys[i].first, keys[i].second};
      launch->tensors[slot] = tensor;
    }
    throw_on_error(kOp, adamw_step_fp8(*launch, masters.front().device.index, cuda_stream));
  }
}

void bound_grad_norms(const Views& grads, const TensorView& norms, const TensorView& partial, py::handle stream) {
  constexpr char kOp[] = "grad_norms";
  if (grads.empty()) return;
  const TensorView& first = grads.front();
  check_list(kOp, "grads", grads, first);
  int64_t blocks = 0;
  for (const TensorView& grad : grads) blocks += ceil_div(grad.num_elements(), int64_t(kNormBlockElements));
  ArgCheck(kOp, "norms", norms)  // FP64, like the partial sums: pairs of words
      .on_device_of(first, "grads")
      .dtype({DataType::kInt32})
      .shape({static_cast<int64_t>(grads.size()), 2})
      .strides({2, 1})
      .aligned(8);
  const ArgCheck check_partial(kOp, "partial", partial);
  check_partial.on_device_of(first, "grads").dtype({DataType::kInt32}).shape({kAny, 2}).strides({2, 1}).aligned(8);
  if (partial.shape[0] < blocks) {
    check_partial.fail("must have " + std::to_string(blocks) + " rows", std::to_string(partial.shape[0]));
  }
  const auto launch = std::make_unique<GradNormsParams>();
  launch->partial = static_cast<double*>(partial.data);
  launch->type = type_of(grads);
  void* cuda_stream = stream_for(kOp, first, stream);
  for (size_t start = 0; start < grads.size(); start += kMaxNormTensors) {
    launch->norms = static_cast<double*>(norms.data) + start;
    launch->num_tensors = static_cast<int>(std::min<size_t>(kMaxNormTensors, grads.size() - start));
    for (int slot = 0; slot < launch->num_tensors; ++slot) {
      launch->tensors[slot] = {grads[start + slot].data, grads[start + slot].num_elements()};
    }
    throw_on_error(kOp, grad_norms(*launch, first.device.index, cuda_stream));
  }
}

}  // namespace

void bind_optim(py::module_& module) {
  module.def("adamw_step", &bound_adamw_step, py::arg("masters"), py::arg("grads"), py::arg("m"), py::arg("v"),
             py::arg("params"), py::kw_only(), py::arg("keys") = Keys(), py::arg("numbers"),
             py::arg("grad_scale") = py::none(), py::arg("stream") = py::none(),
             "One AdamW update of a list of arrays, in place, on a stream; keys round BF16 moments stochastically.");
  module.def("adamw_step_fp8", &bound_adamw_step_fp8, py::arg("masters"), py::arg("grads"), py::arg("m"), py::arg("v"),
             py::arg("data"), py::arg("scale"), py::arg("data_t"), py::arg("scale_t"), py::kw_only(),
             py::arg("keys") = Keys(), py::arg("numbers"), py::arg("grad_scale") = py::none(),
             py::arg("stream") = py::none(),
             "As adamw_step; the new weights, rounded to BF16 and quantised by 128x128 blocks, go to data (X, R, C) "
             "and scale,\n"
             "and, unless those lists are empty, transposed to data_t (X, C, R) and scale_t, whose rows may be apart.");
  module.def(
      "grad_norms", &bound_grad_norms, py::arg("grads"), py::arg("norms"), py::arg("partial"), py::kw_only(),
      py::arg("stream") = py::none(),
      "Writes the 2-norm of each array, on a stream. FP64 travels as rows of two int32: a row a norm, and in partial,\n"
      "which is scratch, a row for each 32768 elements.");
}

}  // namespace dsv3rt
