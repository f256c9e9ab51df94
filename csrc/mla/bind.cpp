#include "mla/bind.h"

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "mla/append_params.h"
#include "mla/decode_params.h"
#include "mla/params.h"

namespace dsv3rt {
namespace {

// Checks of one op's arguments, with its name in the messages.
struct Arguments {
  const char* op;

  HeadsView heads(const char* name, const TensorView& view, int64_t rows, int64_t num_heads, int64_t columns) const {
    ArgCheck(op, name, view)
        .dtype({DataType::kBFloat16})
        .shape({rows, num_heads, columns})
        .strides({kAny, kAny, 1})
        .stride_multiple_of(0, 8)
        .stride_multiple_of(1, 8)
        .stride_at_least(0, 8)
        .stride_at_least(1, 8)
        .aligned(16);
    return {view.data, view.strides[0], view.strides[1]};
  }

  HeadsView rope_keys(const TensorView& view) const {
    ArgCheck(op, "k_rope", view)
        .dtype({DataType::kBFloat16})
        .shape({kAny, kRopeDim})
        .strides({kAny, 1})
        .stride_multiple_of(0, 8)
        .stride_at_least(0, 8)
        .aligned(16);
    return {view.data, view.strides[0], kRopeDim};
  }

  void* contiguous(const char* name, const TensorView& view, DataType dtype, int64_t rows, int64_t columns) const {
    ArgCheck(op, name, view).dtype({dtype}).shape({rows, columns}).strides({columns, 1}).aligned(16);
    return view.data;
  }

  void* contiguous(const char* name, const TensorView& view, int64_t rows, int64_t num_heads, int64_t columns) const {
    ArgCheck(op, name, view)
        .dtype({DataType::kBFloat16})
        .shape({rows, num_heads, columns})
        .strides({num_heads * columns, columns, 1})
        .aligned(16);
    return view.data;
  }

  float* scratch(const char* name, const TensorView& view, int64_t numbers) const {
    ArgCheck(op, name, view).dtype({DataType::kFloat32}).shape({numbers}).strides({1}).aligned(16);
    return static_cast<float*>(view.data);
  }

  const int32_t* ends(const char* name, const TensorView& view, int64_t sequences) const {
    ArgCheck(op, name, view).dtype({DataType::kInt32}).shape({sequences + 1}).strides({1});
    return static_cast<const int32_t*>(view.data);
  }
};

void bound_mla_prefill(const TensorView& q, const TensorView& k_nope, const TensorView& k_rope, const TensorView& v,
                       const TensorView& out, const TensorView& lse, const TensorView& q_ends, const TensorView& k_ends,
                       const TensorView& tile_counter, float scale, bool causal, pybind11::handle stream) {
  constexpr Arguments arguments{"mla_prefill"};
  ArgCheck(arguments.op, "q", q).on_cuda().shape({kAny, kAny, kAny});
  ArgCheck(arguments.op, "q_ends", q_ends).shape({kAny});
  ArgCheck(arguments.op, "tile_counter", tile_counter).dtype({DataType::kInt32}).shape({1});
  MlaPrefillParams params{};
  params.k_rope = arguments.rope_keys(k_rope);
  const int64_t queries = q.shape[0], keys = k_rope.shape[0], heads = q.shape[1], sequences = q_ends.shape[0] - 1;
  params.q = arguments.heads("q", q, queries, heads, kQueryDim);
  params.k_nope = arguments.heads("k_nope", k_nope, keys, heads, kNopeDim);
  params.v = arguments.heads("v", v, keys, heads, kValueDim);
  params.out = arguments.contiguous("out", out, queries, heads, kValueDim);
  params.lse = static_cast<float*>(arguments.contiguous("lse", lse, DataType::kFloat32, queries, heads));
  params.q_ends = arguments.ends("q_ends", q_ends, sequences);
  params.k_ends = arguments.ends("k_ends", k_ends, sequences);
  params.tile_counter = static_cast<int32_t*>(tile_counter.data);
  params.num_queries = static_cast<int>(queries);
  params.num_keys = static_cast<int>(keys);
  params.num_heads = static_cast<int>(heads);
  params.num_sequences = static_cast<int>(sequences);
  params.scale = scale;
  params.causal = causal;
  params.device = q.device.index;
  throw_on_error(arguments.op, mla_prefill(params, stream_for(arguments.op, q, stream)));
}

void bound_mla_prefill_backward(const TensorView& q, const TensorView& k_nope, const TensorView& k_rope,
                                const TensorView& v, const TensorView& out, const TensorView& lse,
                                const TensorView& dout, const TensorView& dlse, const TensorView& dq,
                                const TensorView& dk_nope, const TensorView& dk_rope, const TensorView& dv,
                                const TensorView& q_ends, const TensorView& k_ends, const TensorView& statistics,
                                const TensorView& dk_rope_parts, const TensorView& tile_counters, float scale,
                                bool causal, pybind11::handle stream) {
  constexpr Arguments arguments{"mla_prefill_backward"};
  ArgCheck(arguments.op, "q", q).on_cuda().shape({kAny, kAny, kAny});
  ArgCheck(arguments.op, "q_ends", q_ends).shape({kAny});
  ArgCheck(arguments.op, "tile_counters", tile_counters).dtype({DataType::kInt32}).shape({2});
  MlaBackwardParams params{};
  params.k_rope = arguments.rope_keys(k_rope);
  const int64_t queries = q.shape[0], keys = k_rope.shape[0], heads = q.shape[1], sequences = q_ends.shape[0] - 1;
  const int64_t tiles = heads * (queries / kBackwardQueries + sequences);
  params.q = arguments.heads("q", q, queries, heads, kQueryDim);
  params.k_nope = arguments.heads("k_nope", k_nope, keys, heads, kNopeDim);
  params.v = arguments.heads("v", v, keys, heads, kValueDim);
  params.out = arguments.heads("out", out, queries, heads, kValueDim);
  params.dout = arguments.heads("dout", dout, queries, heads, kValueDim);
  params.lse = static_cast<float*>(arguments.contiguous("lse", lse, DataType::kFloat32, queries, heads));
  params.dlse = static_cast<float*>(arguments.contiguous("dlse", dlse, DataType::kFloat32, queries, heads));
  params.dq = arguments.contiguous("dq", dq, queries, heads, kQueryDim);
  params.dk_rope = arguments.contiguous("dk_rope", dk_rope, DataType::kBFloat16, keys, kRopeDim);
  const HeadsView dk_view = arguments.heads("dk_nope", dk_nope, keys, heads, kNopeDim);
  ArgCheck(arguments.op, "dv", dv)
      .dtype({DataType::kBFloat16})
      .shape({keys, heads, kValueDim})
      .strides({dk_view.row_stride, dk_view.head_stride, 1})
      .aligned(16);
  params.dk_nope = dk_nope.data;
  params.dv = dv.data;
  params.dkv_row_stride = dk_view.row_stride;
  params.dkv_head_stride = dk_view.head_stride;
  params.q_ends = arguments.ends("q_ends", q_ends, sequences);
  params.k_ends = arguments.ends("k_ends", k_ends, sequences);
  params.statistics = arguments.scratch("statistics", statistics, tiles * 2 * kBackwardQueries);
  params.dk_rope_parts = arguments.scratch("dk_rope_parts", dk_rope_parts, heads * keys * kRopeDim);
  params.tile_counters = static_cast<int32_t*>(tile_counters.data);
  params.num_queries = static_cast<int>(queries);
  params.num_keys = static_cast<int>(keys);
  params.num_heads = static_cast<int>(heads);
  params.num_sequences = static_cast<int>(sequences);
  params.num_tiles = static_cast<int>(queries / kBackwardQueries + sequences);
  params.scale = scale;
  params.causal = causal;
  params.device = q.device.index;
  throw_on_error(arguments.op, mla_prefill_backward(params, stream_for(arguments.op, q, stream)));
}

void bound_mla_decode(const TensorView& q, const TensorView& cache, const TensorView& block_table,
                      const TensorView& lengths, const TensorView& out, const TensorView& lse,
                      const TensorView& partial_out, const TensorView& partial_lse, float scale,
                      pybind11::handle stream) {
  constexpr const char* kOp = "mla_decode";
  constexpr double kLog2E = 1.4426950408889634074;
  const auto check = [](const char* name, const TensorView& view, DataType dtype) {
    return ArgCheck(kOp, name, view).dtype({dtype});
  };
  check("q", q, DataType::kBFloat16).on_cuda().shape({kAny, kAny, kAny, kCachedDim}).aligned(16);
  const int64_t requests = q.shape[0], queries = q.shape[1], heads = q.shape[2], rows = queries * heads;
  ArgCheck(kOp, "q", q).strides({rows * kCachedDim, heads * kCachedDim, kCachedDim, 1});
  const bool fp8 = cache.dtype == DataType::kUInt8;
  const int64_t width = fp8 ? kFp8TokenBytes : kCachedDim;
  // The caller says how many rows a block has by the scratch that it gives.
  const bool few_rows = fp8 && partial_lse.rank == 4 && partial_lse.shape[3] == kFp8Rows;
  const int64_t block_rows = few_rows ? kFp8Rows : kDecodeRows;
  ArgCheck(kOp, "cache", cache)
      .dtype({DataType::kBFloat16, DataType::kUInt8})
      .on_device_of(q, "q")
      .shape({kAny, kPageTokens, width})
      .strides({kPageTokens * width, width, 1})
      .aligned(16);
  check("block_table", block_table, DataType::kInt32).shape({requests, kAny}).strides({kAny, 1});
  check("lengths", lengths, DataType::kInt32).shape({requests}).strides({1});
  check("out", out, DataType::kBFloat16).shape({requests, queries, heads, kLatentDim}).aligned(16);
  check("lse", lse, DataType::kFloat32).shape({requests, queries, heads});
  const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
  check("partial_out", partial_out, DataType::kFloat32)
      .shape({row_blocks, kAny, kPartialsAPart, block_rows, kLatentDim})
      .aligned(16);
  const int64_t parts = partial_out.shape[1];
  check("partial_lse", partial_lse, DataType::kFloat32).shape({row_blocks, parts, kPartialsAPart, block_rows});
  MlaDecodeParams params{};
  params.q = q.data;
  params.cache = cache.data;
  params.block_table = static_cast<const int32_t*>(block_table.data);
  params.lengths = static_cast<const int32_t*>(lengths.data);
  params.out = out.data;
  params.lse = static_cast<float*>(lse.data);
  params.partial_out = static_cast<float*>(partial_out.data);
  params.partial_lse = static_cast<float*>(partial_lse.data);
  params.block_table_stride = block_table.strides[0];
  params.num_requests = static_cast<int>(requests);
  params.num_queries = static_cast<int>(queries);
  params.num_heads = static_cast<int>(heads);
  params.num_pages = static_cast<int>(cache.shape[0]);
  params.max_pages = static_cast<int>(block_table.shape[1]);
  params.fp8_cache = fp8;
  params.grid = {static_cast<int>(row_blocks), static_cast<int>(parts), static_cast<int>(block_rows)};
  params.scale_log2 = static_cast<float>(scale * kLog2E);
  params.device = q.device.index;
  throw_on_error(kOp, mla_decode(params, stream_for(kOp, q, stream)));
}

void bound_append_latents(const TensorView& cache, const TensorView& rows, const TensorView& weight,
                          const TensorView& cosines, const TensorView& sines, const TensorView& slots, float eps,
                          pybind11::handle stream) {
  constexpr const char* kOp = "append_latents";
  ArgCheck(kOp, "rows", rows)
      .dtype({DataType::kBFloat16})
      .on_cuda()
      .shape({kAny, kCachedDim})
      .strides({kAny, 1})
      .stride_multiple_of(0, 8)
      .stride_at_least(0, kCachedDim)
      .aligned(16);
  const int64_t tokens = rows.shape[0];
  const bool fp8 = cache.dtype == DataType::kUInt8;
  const int64_t width = fp8 ? kFp8TokenBytes : kCachedDim;
  ArgCheck(kOp, "cache", cache)
      .dtype({DataType::kBFloat16, DataType::kUInt8})
      .on_device_of(rows, "rows")
      .shape({kAny, kPageTokens, width})
      .strides({kPageTokens * width, width, 1})
      .aligned(16);
  ArgCheck(kOp, "weight", weight).dtype({DataType::kBFloat16}).shape({kLatentDim}).strides({1}).aligned(16);
  ArgCheck(kOp, "cosines", cosines).dtype({DataType::kFloat32}).shape({tokens, 32}).strides({32, 1});
  ArgCheck(kOp, "sines", sines).dtype({DataType::kFloat32}).shape({tokens, 32}).strides({32, 1});
  ArgCheck(kOp, "slots", slots).dtype({DataType::kInt64}).shape({tokens}).strides({1});
  AppendParams params{};
  params.rows = rows.data;
  params.weight = weight.data;
  params.cosines = static_cast<const float*>(cosines.data);
  params.sines = static_cast<const float*>(sines.data);
  params.slots = static_cast<const int64_t*>(slots.data);
  params.cache = cache.data;
  params.row_stride = rows.strides[0];
  params.num_slots = cache.shape[0] * kPageTokens;
  params.num_tokens = static_cast<int>(tokens);
  params.eps = eps;
  params.fp8 = fp8;
  params.device = rows.device.index;
  throw_on_error(kOp, append_latents(params, stream_for(kOp, rows, stream)));
}

}  // namespace

void bind_mla(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("mla_prefill", &bound_mla_prefill, py::arg("q"), py::arg("k_nope"), py::arg("k_rope"), py::arg("v"),
             py::arg("out"), py::arg("lse"), py::arg("q_ends"), py::arg("k_ends"), py::arg("tile_counter"),
             py::kw_only(), py::arg("scale"), py::arg("causal"), py::arg("stream") = py::none(),
             "Writes out and lse of every query, on a stream; the ends of sequences stay on the device.");
  module.def("mla_prefill_backward", &bound_mla_prefill_backward, py::arg("q"), py::arg("k_nope"), py::arg("k_rope"),
             py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dout"), py::arg("dlse"), py::arg("dq"),
             py::arg("dk_nope"), py::arg("dk_rope"), py::arg("dv"), py::arg("q_ends"), py::arg("k_ends"),
             py::arg("statistics"), py::arg("dk_rope_parts"), py::arg("tile_counters"), py::kw_only(), py::arg("scale"),
             py::arg("causal"), py::arg("stream") = py::none(),
             "Writes dq, dk_nope, dk_rope and dv, on a stream; the last three arrays are scratch.");
  module.def(
      "mla_decode", &bound_mla_decode, py::arg("q"), py::arg("cache"), py::arg("block_table"), py::arg("lengths"),
      py::arg("out"), py::arg("lse"), py::arg("partial_out"), py::arg("partial_lse"), py::kw_only(), py::arg("scale"),
      py::arg("stream") = py::none(),
      "Writes out and lse, on a stream; lengths stay on the device. The shape of the partial results sets the grid.");
  module.def("append_latents", &bound_append_latents, py::arg("cache"), py::arg("rows"), py::arg("weight"),
             py::arg("cosines"), py::arg("sines"), py::arg("slots"), py::kw_only(), py::arg("eps"),
             py::arg("stream") = py::none(),
             "Writes tokens into a latent cache, on a stream; slots stay on the device.");
}

}  // namespace dsv3rt
