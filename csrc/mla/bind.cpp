#include "mla/bind.h"

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "mla/params.h"

namespace dsv3rt {
namespace {

constexpr char kOp[] = "mla_prefill";

HeadsView heads_view(const char* name, const TensorView& view, int64_t rows, int64_t heads, int64_t columns) {
  ArgCheck(kOp, name, view)
      .dtype({DataType::kBFloat16})
      .shape({rows, heads, columns})
      .strides({kAny, kAny, 1})
      .stride_multiple_of(0, 8)
      .stride_multiple_of(1, 8)
      .aligned(16);
  return {view.data, view.strides[0], view.strides[1]};
}

const int32_t* ends_of(const char* name, const TensorView& view, int64_t sequences) {
  ArgCheck(kOp, name, view).dtype({DataType::kInt32}).shape({sequences + 1}).strides({1});
  return static_cast<const int32_t*>(view.data);
}

void bound_mla_prefill(const TensorView& q, const TensorView& k_nope, const TensorView& k_rope, const TensorView& v,
                       const TensorView& out, const TensorView& lse, const TensorView& q_ends, const TensorView& k_ends,
                       const TensorView& tile_counter, float scale, bool causal, bool ping_pong,
                       pybind11::handle stream) {
  ArgCheck(kOp, "q", q).on_cuda().shape({kAny, kAny, kAny});
  ArgCheck(kOp, "k_rope", k_rope)
      .dtype({DataType::kBFloat16})
      .shape({kAny, kRopeDim})
      .strides({kAny, 1})
      .stride_multiple_of(0, 8)
      .aligned(16);
  ArgCheck(kOp, "q_ends", q_ends).shape({kAny});
  ArgCheck(kOp, "tile_counter", tile_counter).dtype({DataType::kInt32}).shape({1});
  const int64_t queries = q.shape[0], keys = k_rope.shape[0], heads = q.shape[1], sequences = q_ends.shape[0] - 1;
  ArgCheck(kOp, "out", out)
      .dtype({DataType::kBFloat16})
      .shape({queries, heads, kValueDim})
      .strides({heads * kValueDim, kValueDim, 1})
      .aligned(16);
  ArgCheck(kOp, "lse", lse).dtype({DataType::kFloat32}).shape({queries, heads}).strides({heads, 1});

  MlaPrefillParams params{};
  params.q = heads_view("q", q, queries, heads, kQueryDim);
  params.k_nope = heads_view("k_nope", k_nope, keys, heads, kNopeDim);
  params.k_rope = {k_rope.data, k_rope.strides[0], kRopeDim};
  params.v = heads_view("v", v, keys, heads, kValueDim);
  params.out = out.data;
  params.lse = static_cast<float*>(lse.data);
  params.q_ends = ends_of("q_ends", q_ends, sequences);
  params.k_ends = ends_of("k_ends", k_ends, sequences);
  params.tile_counter = static_cast<int32_t*>(tile_counter.data);
  params.num_queries = static_cast<int>(queries);
  params.num_keys = static_cast<int>(keys);
  params.num_heads = static_cast<int>(heads);
  params.num_sequences = static_cast<int>(sequences);
  params.scale = scale;
  params.causal = causal;
  params.ping_pong = ping_pong;
  params.device = q.device.index;
  throw_on_error(kOp, mla_prefill(params, stream_for(kOp, q, stream)));
}

}  // namespace

void bind_mla(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("mla_prefill", &bound_mla_prefill, py::arg("q"), py::arg("k_nope"), py::arg("k_rope"), py::arg("v"),
             py::arg("out"), py::arg("lse"), py::arg("q_ends"), py::arg("k_ends"), py::arg("tile_counter"),
             py::kw_only(), py::arg("scale"), py::arg("causal"), py::arg("ping_pong") = false,
             py::arg("stream") = py::none(),
             "Writes out and lse of every query, on a stream; the ends of sequences stay on the device.");
}

}  // namespace dsv3rt
