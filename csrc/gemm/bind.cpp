#include "gemm/bind.h"

#include <optional>
#include <tuple>

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "common/math.h"
#include "gemm/heuristics.h"
#include "gemm/params.h"

namespace dsv3rt {
namespace {

namespace py = pybind11;

using Tile = std::tuple<int, int, int, int>;  // block_m, block_n, share (0 none, 1 A, 2 B, 3 depth), band

constexpr std::initializer_list<DataType> kFp8 = {DataType::kFloat8E4M3, DataType::kUInt8};

std::optional<GemmChoice> choice_of(const std::optional<Tile>& tile) {
  if (!tile) return std::nullopt;
  const auto [m, n, share, band] = *tile;
  if (share < 0 || share > 3 || band < 1) throw py::value_error("fp8_gemm: tile must be (m, n, share 0..3, band >= 1)");
  return GemmChoice{{m, n}, static_cast<Share>(share), band};
}

void check_operand(const char* op, const char* name, const TensorView& view, int64_t rows, int64_t columns) {
  ArgCheck(op, name, view).dtype(kFp8).shape({rows, columns}).strides({kAny, 1}).stride_multiple_of(0, 16).aligned(16);
}

void check_row_scales(const char* op, const char* name, const TensorView& view, int64_t rows, int64_t k) {
  ArgCheck(op, name, view)
      .dtype({DataType::kFloat32})
      .shape({rows, ceil_div(k, int64_t(128))})
      .strides({1, kAny})
      .stride_multiple_of(1, 4)
      .aligned(16);
}

GemmOutput output_of(const char* op, const TensorView& d, bool accumulate) {
  const ArgCheck check(op, "d", d);
  if (accumulate) check.dtype({DataType::kFloat32});
  check.dtype({DataType::kBFloat16, DataType::kFloat32});
  if (accumulate) return GemmOutput::kFloat32Add;
  return d.dtype == DataType::kBFloat16 ? GemmOutput::kBFloat16 : GemmOutput::kFloat32;
}

// What every form shares: A with its scales, the destination's rows, the device.
GemmParams params_for(const char* op, const TensorView& a, const TensorView& scale_a, const TensorView& d) {
  ArgCheck(op, "a", a).on_cuda().shape({kAny, kAny});
  check_operand(op, "a", a, a.shape[0], a.shape[1]);
  check_row_scales(op, "scale_a", scale_a, a.shape[0], a.shape[1]);
  GemmParams params{};
  params.a = static_cast<const uint8_t*>(a.data);
  params.scale_a = static_cast<const float*>(scale_a.data);
  params.d = d.data;
  params.m = static_cast<int>(a.shape[0]);
  params.k = static_cast<int>(a.shape[1]);
  params.stride_a = a.strides[0];
  params.stride_scale_a = scale_a.strides[1];
  params.num_groups = 1;
  params.device = a.device.index;
  return params;
}

void take_row_scaled_b(const char* op, GemmParams& params, const TensorView& b, const TensorView& scale_b) {
  check_operand(op, "b", b, kAny, params.k);
  check_row_scales(op, "scale_b", scale_b, b.shape[0], params.k);
  params.scale_b_kind = ScaleB::kRow;
  params.stride_scale_b = scale_b.strides[1];
}

void take_layout(const char* op, GemmParams& params, const TensorView& counts, const TensorView& offsets,
                 int64_t groups) {
  ArgCheck(op, "counts", counts).dtype({DataType::kInt32}).shape({groups}).strides({1});
  if (groups > 512) ArgCheck(op, "counts", counts).fail("must have at most 512 groups", std::to_string(groups));
  params.counts = static_cast<const int32_t*>(counts.data);
  params.num_groups = static_cast<int>(groups);
  ArgCheck(op, "offsets", offsets).dtype({DataType::kInt32}).shape({groups + 1}).strides({1});
  params.offsets = static_cast<const int32_t*>(offsets.data);
}

void launch(const char* op, GemmParams& params, int num_sms, const std::optional<Tile>& tile, const TensorView& a,
            py::handle stream) {
  params.num_sms = num_sms;
  const auto choice = choice_of(tile);
  throw_on_error(op, fp8_gemm_nt(params, choice ? &*choice : nullptr, stream_for(op, a, stream)));
}

void bound_fp8_gemm_nt(const TensorView& a, const TensorView& scale_a, const TensorView& b, const TensorView& scale_b,
                       const TensorView& d, bool accumulate, int num_sms, const std::optional<Tile>& tile,
                       py::handle stream) {
  constexpr char kOp[] = "fp8_gemm_nt";
  GemmParams params = params_for(kOp, a, scale_a, d);
  check_operand(kOp, "b", b, kAny, params.k);
  const int64_t n = b.shape[0];
  const int64_t n_blocks = ceil_div(n, int64_t(128)), k_blocks = ceil_div(int64_t(params.k), int64_t(128));
  if (scale_b.rank == 2 && scale_b.shape[0] == n && n != n_blocks) {
    take_row_scaled_b(kOp, params, b, scale_b);
  } else {
    ArgCheck(kOp, "scale_b", scale_b).dtype({DataType::kFloat32}).shape({n_blocks, k_blocks}).strides({k_blocks, 1});
    params.scale_b_kind = ScaleB::kBlock128;
  }
  ArgCheck(kOp, "d", d).shape({params.m, n}).strides({kAny, 1}).stride_multiple_of(0, 8).aligned(16);
  params.output = output_of(kOp, d, accumulate);
  params.b = static_cast<const uint8_t*>(b.data);
  params.scale_b = static_cast<const float*>(scale_b.data);
  params.n = static_cast<int>(n);
  params.stride_b = b.strides[0];
  params.stride_d = d.strides[0];
  params.grouping = Grouping::kNone;
  launch(kOp, params, num_sms, tile, a, stream);
}

void bound_m_grouped(const TensorView& a, const TensorView& scale_a, const TensorView& b, const TensorView& scale_b,
                     const TensorView& d, const TensorView& counts, const TensorView& offsets, int num_sms,
                     const std::optional<Tile>& tile, py::handle stream) {
  constexpr char kOp[] = "m_grouped_fp8_gemm_nt";
  GemmParams params = params_for(kOp, a, scale_a, d);
  ArgCheck(kOp, "b", b).dtype(kFp8).shape({kAny, kAny, params.k}).aligned(16);
  const int64_t groups = b.shape[0], n = b.shape[1];
  const int64_t n_blocks = ceil_div(n, int64_t(128)), k_blocks = ceil_div(int64_t(params.k), int64_t(128));
  ArgCheck(kOp, "b", b).strides({n * params.k, params.k, 1}).stride_multiple_of(1, 16);
  ArgCheck(kOp, "scale_b", scale_b)
      .dtype({DataType::kFloat32})
      .shape({groups, n_blocks, k_blocks})
      .strides({n_blocks * k_blocks, k_blocks, 1});
  ArgCheck(kOp, "d", d).shape({params.m, n}).strides({kAny, 1}).stride_multiple_of(0, 8).aligned(16);
  take_layout(kOp, params, counts, offsets, groups);
  params.output = output_of(kOp, d, false);
  params.scale_b_kind = ScaleB::kBlock128;
  params.b = static_cast<const uint8_t*>(b.data);
  params.scale_b = static_cast<const float*>(scale_b.data);
  params.n = static_cast<int>(n);
  params.stride_b = params.k;
  params.stride_d = d.strides[0];
  params.grouping = Grouping::kRows;
  launch(kOp, params, num_sms, tile, a, stream);
}

void bound_k_grouped(const TensorView& a, const TensorView& scale_a, const TensorView& b, const TensorView& scale_b,
                     const TensorView& d, const TensorView& counts, const TensorView& offsets, bool accumulate,
                     int num_sms, const std::optional<Tile>& tile, py::handle stream) {
  constexpr char kOp[] = "k_grouped_fp8_gemm_nt";
  GemmParams params = params_for(kOp, a, scale_a, d);
  take_row_scaled_b(kOp, params, b, scale_b);
  const int64_t n = b.shape[0];
  ArgCheck(kOp, "d", d).shape({kAny, params.m, n}).strides({params.m * n, n, 1}).stride_multiple_of(1, 4).aligned(16);
  take_layout(kOp, params, counts, offsets, d.shape[0]);
  ArgCheck(kOp, "d", d).dtype({DataType::kFloat32});
  params.output = output_of(kOp, d, accumulate);
  params.b = static_cast<const uint8_t*>(b.data);
  params.scale_b = static_cast<const float*>(scale_b.data);
  params.n = static_cast<int>(n);
  params.stride_b = b.strides[0];
  params.stride_d = n;
  params.grouping = Grouping::kDepth;
  launch(kOp, params, num_sms, tile, a, stream);
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("fp8_gemm_nt", &bound_fp8_gemm_nt, py::arg("a"), py::arg("scale_a"), py::arg("b"), py::arg("scale_b"),
             py::arg("d"), py::kw_only(), py::arg("accumulate") = false, py::arg("num_sms") = 0,
             py::arg("tile") = py::none(), py::arg("stream") = py::none(),
             "d (+)= a b^T on block-scaled FP8 operands, on a stream; tile overrides the heuristics.");
  module.def("m_grouped_fp8_gemm_nt", &bound_m_grouped, py::arg("a"), py::arg("scale_a"), py::arg("b"),
             py::arg("scale_b"), py::arg("d"), py::arg("counts"), py::arg("offsets"), py::kw_only(),
             py::arg("num_sms") = 0, py::arg("tile") = py::none(), py::arg("stream") = py::none(),
             "Rows of group g times b[g]^T; counts and offsets stay on the device.");
  module.def("k_grouped_fp8_gemm_nt", &bound_k_grouped, py::arg("a"), py::arg("scale_a"), py::arg("b"),
             py::arg("scale_b"), py::arg("d"), py::arg("counts"), py::arg("offsets"), py::kw_only(),
             py::arg("accumulate") = true, py::arg("num_sms") = 0, py::arg("tile") = py::none(),
             py::arg("stream") = py::none(),
             "d[g] (+)= a[:, segment g] b[:, segment g]^T; added to, the d of an empty group stays as it is.");
}

}  // namespace dsv3rt
