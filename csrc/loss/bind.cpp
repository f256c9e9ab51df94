#include "loss/bind.h"

#include <optional>

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "common/math.h"
#include "loss/params.h"

namespace dsv3rt {
namespace {

namespace py = pybind11;

void bound_softmax_loss(const TensorView& logits, const TensorView& labels, const TensorView& factor,
                        const TensorView& loss, const std::optional<TensorView>& dlogits, int64_t ignore_index,
                        float z_loss, py::handle stream) {
  constexpr char kOp[] = "softmax_loss";
  const ArgCheck check_logits(kOp, "logits", logits);
  check_logits.on_cuda().dtype({DataType::kFloat32}).shape({kAny, kAny}).strides({kAny, 1}).aligned(16);
  check_logits.stride_multiple_of(0, 4);
  const int64_t tokens = logits.shape[0], vocab = logits.shape[1];
  if (vocab < 1 || vocab > kMaxVocab) {
    check_logits.fail("must have 1 to " + std::to_string(kMaxVocab) + " columns", std::to_string(vocab));
  }
  if (tokens > INT32_MAX / 8) check_logits.fail("must have fewer than 2^28 rows", std::to_string(tokens));
  ArgCheck(kOp, "labels", labels).on_device_of(logits, "logits").dtype({DataType::kInt64}).shape({tokens}).strides({1});
  ArgCheck(kOp, "factor", factor).on_device_of(logits, "logits").dtype({DataType::kFloat32}).shape({});
  ArgCheck(kOp, "loss", loss).on_device_of(logits, "logits").dtype({DataType::kFloat32}).shape({tokens}).strides({1});

  SoftmaxLossParams params{};
  if (dlogits) {
    ArgCheck(kOp, "dlogits", *dlogits)
        .on_device_of(logits, "logits")
        .dtype({DataType::kBFloat16})
        .shape({tokens, vocab})
        .strides({kAny, 1})
        .stride_multiple_of(0, 8)
        .aligned(16);
    params.dlogits = dlogits->data;
    params.dlogits_stride = dlogits->strides[0];
  }
  params.logits = static_cast<const float*>(logits.data);
  params.labels = static_cast<const int64_t*>(labels.data);
  params.factor = static_cast<const float*>(factor.data);
  params.loss = static_cast<float*>(loss.data);
  params.logits_stride = logits.strides[0];
  params.num_tokens = tokens;
  params.vocab = static_cast<int>(vocab);
  params.ignore_index = ignore_index;
  params.z_loss = z_loss;
  params.device = logits.device.index;
  throw_on_error(kOp, softmax_loss(params, stream_for(kOp, logits, stream)));
}

}  // namespace

void bind_loss(py::module_& module) {
  module.def("softmax_loss", &bound_softmax_loss, py::arg("logits"), py::arg("labels"), py::arg("factor"),
             py::arg("loss"), py::kw_only(), py::arg("dlogits") = py::none(), py::arg("ignore_index") = -100,
             py::arg("z_loss") = 0.0f, py::arg("stream") = py::none(),
             "Writes each row's loss and, on request, factor times its gradient to the logits, on a stream.");
}

}  // namespace dsv3rt
