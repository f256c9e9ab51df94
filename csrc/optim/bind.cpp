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

void bound_adamw_step(const Views& masters, const Views& grads, const Views& m, const Views& v, const Views& params,
                      const Keys& keys, const std::vector<float>& numbers, const std::optional<TensorView>& grad_scale,
                      py::handle stream) {
  constexpr char kOp[] = "adamw_step";
  if (masters.empty()) return;
  for (const TensorView& master : masters) ArgCheck(kOp, "masters", master).dtype({DataType::kFloat32});
  check_list(kOp, "masters", masters, masters.front());
  check_like(kOp, "grads", grads, masters);
  check_like(kOp, "m", m, masters);
  check_like(kOp, "v", v, masters);
  for (const TensorView& view : v) ArgCheck(kOp, "v", view).dtype({m.front().dtype});
  if (!params.empty()) check_like(kOp, "params", params, masters);
  if (!keys.empty() && keys.size() != masters.size()) {
    throw py::value_error(std::string(kOp) + ": keys must be none or as many as masters, " +
                          std::to_string(masters.size()) + ", got " + std::to_string(keys.size()));
  }
  const auto launch = std::make_unique<AdamWParams>();
  launch->numbers = numbers_of(kOp, numbers);
  if (grad_scale) {
    const ArgCheck check(kOp, "grad_scale", *grad_scale);
    check.on_device_of(masters.front(), "masters").dtype({DataType::kFloat32});
    if (grad_scale->num_elements() != 1) check.fail("must be one number", std::to_string(grad_scale->num_elements()));
    launch->grad_scale = static_cast<const float*>(grad_scale->data);
  }
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
  module.def(
      "grad_norms", &bound_grad_norms, py::arg("grads"), py::arg("norms"), py::arg("partial"), py::kw_only(),
      py::arg("stream") = py::none(),
      "Writes the 2-norm of each array, on a stream. FP64 travels as rows of two int32: a row a norm, and in partial,\n"
      "which is scratch, a row for each 32768 elements.");
}

}  // namespace dsv3rt
