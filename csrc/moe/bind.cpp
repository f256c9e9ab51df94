#include "moe/bind.h"

#include <optional>

#include "common/arg_check.h"
#include "common/dlpack_caster.h"
#include "moe/params.h"

namespace dsv3rt {
namespace {

namespace py = pybind11;
using MaybeView = std::optional<TensorView>;

// Contiguous arrays on the device of the first.
class Arguments {
 public:
  Arguments(const char* op, const TensorView& first) : op_(op), first_(first) {}

  void* matrix(const char* name, const TensorView& view, std::initializer_list<DataType> dtypes, int64_t rows,
               int64_t columns) const {
    check(name, view, dtypes).shape({rows, columns}).strides({columns, 1});
    return view.data;
  }

  void* vector(const char* name, const TensorView& view, DataType dtype, int64_t size) const {
    check(name, view, {dtype}).shape({size}).strides({1});
    return view.data;
  }

  // (rows, tiles) with rows contiguous.
  void* scales(const char* name, const TensorView& view, int64_t rows, int64_t tiles) const {
    check(name, view, {DataType::kFloat32}).shape({rows, tiles}).strides({1, kAny}).stride_at_least(1, rows);
    return view.data;
  }

  // Rows that are read and written 16 bytes at a time.
  void* rows(const char* name, const TensorView& view, std::initializer_list<DataType> dtypes, int64_t rows,
             int64_t columns) const {
    matrix(name, view, dtypes, rows, columns);
    const ArgCheck checked(op_, name, view);
    checked.aligned(16);
    const int64_t bytes = columns * (view.dtype == DataType::kBFloat16 ? 2 : 1);
    if (bytes % 16 != 0) checked.fail("must have rows of a multiple of 16 bytes", std::to_string(bytes));
    return view.data;
  }

  // Rows of experts that are read and written 16 bytes at a time where their number allows it.
  void* experts(const char* name, const TensorView& view, std::initializer_list<DataType> dtypes, int64_t rows,
                int64_t columns) const {
    matrix(name, view, dtypes, rows, columns);
    ArgCheck(op_, name, view).aligned(16);
    return view.data;
  }

  void at_most(const char* name, int64_t value, int64_t limit) const {
    if (value < 1 || value > limit) {
      throw py::value_error(std::string(op_) + ": " + name + " must be in 1.." + std::to_string(limit) + ", got " +
                            std::to_string(value));
    }
  }

 private:
  ArgCheck check(const char* name, const TensorView& view, std::initializer_list<DataType> dtypes) const {
    const ArgCheck checked(op_, name, view);
    checked.on_cuda().on_device_of(first_, "the first array").dtype(dtypes);
    return checked;
  }

  const char* op_;
  const TensorView& first_;
};

void bound_route(const TensorView& logits, const TensorView& bias, const TensorView& idx, const TensorView& weight,
                 const TensorView& scores, const TensorView& counts, int num_groups, int groups_kept, float scale,
                 bool renormalize, py::handle stream) {
  const Arguments arguments("route", logits);
  ArgCheck("route", "idx", idx).shape({kAny, kAny});
  ArgCheck("route", "bias", bias).shape({kAny});
  const int64_t tokens = idx.shape[0], top_k = idx.shape[1], experts = bias.shape[0];
  arguments.at_most("the number of experts", experts, kMaxExperts);
  arguments.at_most("top_k", top_k, kMaxTopK);
  arguments.at_most("num_groups", num_groups, kMaxExpertGroups);
  if (experts % num_groups != 0) {
    ArgCheck("route", "bias", bias).fail("must hold groups of one size", std::to_string(experts));
  }
  RouteParams params{};
  params.logits = arguments.experts("logits", logits, {DataType::kFloat32, DataType::kBFloat16}, tokens, experts);
  params.bias = static_cast<const float*>(arguments.vector("bias", bias, DataType::kFloat32, experts));
  params.idx = static_cast<int64_t*>(arguments.matrix("idx", idx, {DataType::kInt64}, tokens, top_k));
  params.weight = static_cast<float*>(arguments.matrix("weight", weight, {DataType::kFloat32}, tokens, top_k));
  params.scores = static_cast<float*>(arguments.experts("scores", scores, {DataType::kFloat32}, tokens, experts));
  params.counts = static_cast<int64_t*>(arguments.vector("counts", counts, DataType::kInt64, experts));
  params.num_tokens = tokens;
  params.num_experts = static_cast<int>(experts);
  params.num_groups = num_groups;
  params.groups_kept = groups_kept;
  params.top_k = static_cast<int>(top_k);
  params.scale = scale;
  params.renormalize = renormalize;
  params.logits_bf16 = logits.dtype == DataType::kBFloat16;
  ArgCheck("route", "bias", bias).aligned(16);
  params.device = logits.device.index;
  throw_on_error("route", route(params, stream_for("route", logits, stream)));
}

void bound_route_backward(const TensorView& weight_grad, const MaybeView& scores_grad, const TensorView& scores,
                          const TensorView& idx, const TensorView& logits_grad, float scale, bool renormalize,
                          py::handle stream) {
  constexpr char kOp[] = "route_backward";
  const Arguments arguments(kOp, scores);
  ArgCheck(kOp, "idx", idx).shape({kAny, kAny});
  ArgCheck(kOp, "scores", scores).shape({kAny, kAny});
  const int64_t tokens = idx.shape[0], top_k = idx.shape[1], experts = scores.shape[1];
  arguments.at_most("the number of experts", experts, kMaxExperts);
  arguments.at_most("top_k", top_k, kMaxTopK);
  RouteBackwardParams params{};
  const auto floats = {DataType::kFloat32};
  params.weight_grad = static_cast<const float*>(arguments.matrix("weight_grad", weight_grad, floats, tokens, top_k));
  if (scores_grad) {
    params.scores_grad =
        static_cast<const float*>(arguments.experts("scores_grad", *scores_grad, floats, tokens, experts));
  }
  params.scores = static_cast<const float*>(arguments.experts("scores", scores, floats, tokens, experts));
  params.idx = static_cast<const int64_t*>(arguments.matrix("idx", idx, {DataType::kInt64}, tokens, top_k));
  params.logits_grad =
      arguments.experts("logits_grad", logits_grad, {DataType::kFloat32, DataType::kBFloat16}, tokens, experts);
  params.num_tokens = tokens;
  params.num_experts = static_cast<int>(experts);
  params.top_k = static_cast<int>(top_k);
  params.scale = scale;
  params.renormalize = renormalize;
  params.logits_bf16 = logits_grad.dtype == DataType::kBFloat16;
  params.device = scores.device.index;
  throw_on_error(kOp, route_backward(params, stream_for(kOp, scores, stream)));
}

void bound_balance_loss(const TensorView& scores, const TensorView& idx, const TensorView& cu_seqlens,
                        const TensorView& loss, const TensorView& slope, const TensorView& sequence_loss,
                        const TensorView& share_parts, const TensorView& load_parts, const TensorView& tickets,
                        float alpha, py::handle stream) {
  constexpr char kOp[] = "balance_loss";
  const Arguments arguments(kOp, scores);
  ArgCheck(kOp, "scores", scores).shape({kAny, kAny});
  ArgCheck(kOp, "idx", idx).shape({kAny, kAny});
  ArgCheck(kOp, "slope", slope).shape({kAny, kAny});
  ArgCheck(kOp, "share_parts", share_parts).shape({kAny, kAny, kAny});
  const int64_t tokens = scores.shape[0], experts = scores.shape[1], top_k = idx.shape[1];
  const int64_t sequences = slope.shape[0], parts = share_parts.shape[1];
  arguments.at_most("the number of experts", experts, kMaxExperts);
  arguments.at_most("top_k", top_k, kMaxTopK);
  if (parts < 1) throw py::value_error("balance_loss: share_parts must have a part a sequence, got none");
  const auto floats = {DataType::kFloat32};
  const auto check_parts = [&](const char* name, const TensorView& view, DataType dtype) {
    ArgCheck(kOp, name, view)
        .on_device_of(scores, "scores")
        .dtype({dtype})
        .shape({sequences, parts, experts})
        .strides({parts * experts, experts, 1});
    return view.data;
  };
  BalanceParams params{};
  params.scores = static_cast<const float*>(arguments.experts("scores", scores, floats, tokens, experts));
  params.idx = static_cast<const int64_t*>(arguments.matrix("idx", idx, {DataType::kInt64}, tokens, top_k));
  params.cu_seqlens =
      static_cast<const int32_t*>(arguments.vector("cu_seqlens", cu_seqlens, DataType::kInt32, sequences + 1));
  params.share_parts = static_cast<float*>(check_parts("share_parts", share_parts, DataType::kFloat32));
  params.load_parts = static_cast<int32_t*>(check_parts("load_parts", load_parts, DataType::kInt32));
  params.sequence_loss =
      static_cast<float*>(arguments.vector("sequence_loss", sequence_loss, DataType::kFloat32, sequences));
  params.tickets = static_cast<int32_t*>(arguments.vector("tickets", tickets, DataType::kInt32, sequences + 1));
  params.slope = static_cast<float*>(arguments.experts("slope", slope, floats, sequences, experts));
  params.loss = static_cast<float*>(arguments.vector("loss", loss, DataType::kFloat32, 1));
  params.num_tokens = tokens;
  params.num_sequences = static_cast<int>(sequences);
  params.num_parts = static_cast<int>(parts);
  params.num_experts = static_cast<int>(experts);
  params.top_k = static_cast<int>(top_k);
  params.alpha = alpha;
  params.device = scores.device.index;
  throw_on_error(kOp, balance_loss(params, stream_for(kOp, scores, stream)));
}

void bound_balance_loss_backward(const TensorView& grad, const TensorView& scores, const TensorView& slope,
                                 const TensorView& cu_seqlens, const TensorView& scores_grad, py::handle stream) {
  constexpr char kOp[] = "balance_loss_backward";
  const Arguments arguments(kOp, scores);
  ArgCheck(kOp, "scores", scores).shape({kAny, kAny});
  ArgCheck(kOp, "slope", slope).shape({kAny, kAny});
  const int64_t tokens = scores.shape[0], experts = scores.shape[1], sequences = slope.shape[0];
  arguments.at_most("the number of experts", experts, kMaxExperts);
  const auto floats = {DataType::kFloat32};
  BalanceBackwardParams params{};
  params.grad = static_cast<const float*>(arguments.vector("grad", grad, DataType::kFloat32, 1));
  params.scores = static_cast<const float*>(arguments.experts("scores", scores, floats, tokens, experts));
  params.slope = static_cast<const float*>(arguments.experts("slope", slope, floats, sequences, experts));
  params.cu_seqlens =
      static_cast<const int32_t*>(arguments.vector("cu_seqlens", cu_seqlens, DataType::kInt32, sequences + 1));
  params.scores_grad = static_cast<float*>(arguments.experts("scores_grad", scores_grad, floats, tokens, experts));
  params.num_tokens = tokens;
  params.num_sequences = static_cast<int>(sequences);
  params.num_experts = static_cast<int>(experts);
  params.device = scores.device.index;
  throw_on_error(kOp, balance_loss_backward(params, stream_for(kOp, scores, stream)));
}

void bound_place(const TensorView& idx, const TensorView& row_of, const TensorView& counts, const TensorView& offsets,
                 const TensorView& partial, int block, py::handle stream) {
  const Arguments arguments("place", idx);
  ArgCheck("place", "idx", idx).shape({kAny, kAny});
  ArgCheck("place", "counts", counts).shape({kAny});
  ArgCheck("place", "partial", partial).shape({kAny});
  const int64_t experts = counts.shape[0];
  arguments.at_most("the number of experts", experts, kMaxExperts);
  if (block < 1) throw py::value_error("place: block must be positive, got " + std::to_string(block));
  const auto longs = {DataType::kInt64};
  PlaceParams params{};
  params.idx = static_cast<const int64_t*>(arguments.matrix("idx", idx, longs, idx.shape[0], idx.shape[1]));
  params.row_of = static_cast<int64_t*>(arguments.matrix("row_of", row_of, longs, idx.shape[0], idx.shape[1]));
  params.counts = static_cast<int32_t*>(arguments.vector("counts", counts, DataType::kInt32, experts));
  params.offsets = static_cast<int32_t*>(arguments.vector("offsets", offsets, DataType::kInt32, experts + 1));
  params.partial =
      static_cast<int32_t*>(arguments.vector("partial", partial, DataType::kInt32, kMaxPlaceBlocks * experts));
  params.num_choices = idx.num_elements();
  params.num_experts = static_cast<int>(experts);
  params.block = block;
  params.device = idx.device.index;
  throw_on_error("place", place(params, stream_for("place", idx, stream)));
}

// What the three kernels that move rows know of the choices and the segments.
template <class Params>
void fill_choices(const Arguments& arguments, const TensorView& row_of, int64_t num_rows, Params& params) {
  const int64_t tokens = row_of.shape[0], top_k = row_of.shape[1];
  arguments.at_most("top_k", top_k, kMaxTopK);
  params.row_of = static_cast<const int64_t*>(arguments.matrix("row_of", row_of, {DataType::kInt64}, tokens, top_k));
  params.num_tokens = tokens;
  params.num_rows = num_rows;
  params.top_k = static_cast<int>(top_k);
}

template <class Params>
void fill_segments(const Arguments& arguments, const TensorView& counts, const TensorView& offsets, Params& params) {
  const int64_t experts = counts.num_elements();
  arguments.at_most("the number of experts", experts, kMaxExperts);
  params.counts = static_cast<const int32_t*>(arguments.vector("counts", counts, DataType::kInt32, experts));
  params.offsets = static_cast<const int32_t*>(arguments.vector("offsets", offsets, DataType::kInt32, experts + 1));
  params.num_experts = static_cast<int>(experts);
}

void bound_permute(const TensorView& x, const TensorView& row_of, const TensorView& counts, const TensorView& offsets,
                   const TensorView& rows, const MaybeView& scale, const MaybeView& rows_scale,
                   const MaybeView& packed_scale, const MaybeView& token_of_row, py::handle stream) {
  const Arguments arguments("permute", x);
  ArgCheck("permute", "x", x).shape({kAny, kAny});
  ArgCheck("permute", "rows", rows).shape({kAny, kAny});
  ArgCheck("permute", "row_of", row_of).shape({kAny, kAny});
  const bool has_scale = scale.has_value();
  for (const MaybeView* other : {&rows_scale, &packed_scale, &token_of_row}) {
    if (other->has_value() != has_scale) {
      throw py::value_error(
          "permute: scale, rows_scale, packed_scale and token_of_row must be given all or not at all, got some");
    }
  }
  const int64_t tokens = x.shape[0], columns = x.shape[1], num_rows = rows.shape[0];
  PermuteParams params{};
  const auto dtypes = {DataType::kBFloat16, DataType::kUInt8};
  params.x = arguments.rows("x", x, dtypes, tokens, columns);
  params.rows = arguments.rows("rows", rows, {x.dtype}, num_rows, columns);
  fill_choices(arguments, row_of, num_rows, params);
  if (row_of.shape[0] != tokens) ArgCheck("permute", "row_of", row_of).shape({tokens, kAny});
  fill_segments(arguments, counts, offsets, params);
  if (scale) {
    ArgCheck("permute", "scale", *scale).shape({tokens, kAny});
    const int64_t tiles = scale->shape[1];
    params.scale = static_cast<const float*>(arguments.scales("scale", *scale, tokens, tiles));
    params.rows_scale = static_cast<float*>(arguments.scales("rows_scale", *rows_scale, num_rows, tiles));
    params.packed_scale =
        static_cast<float*>(arguments.matrix("packed_scale", *packed_scale, {DataType::kFloat32}, tokens, tiles));
    params.token_of_row =
        static_cast<int32_t*>(arguments.vector("token_of_row", *token_of_row, DataType::kInt32, num_rows));
    params.scale_stride = scale->strides[1];
    params.rows_scale_stride = rows_scale->strides[1];
    params.num_tiles = static_cast<int>(tiles);
  }
  params.row_bytes = static_cast<int>(columns * (x.dtype == DataType::kBFloat16 ? 2 : 1));
  params.device = x.device.index;
  throw_on_error("permute", permute(params, stream_for("permute", x, stream)));
}

void bound_unpermute(const TensorView& rows, const MaybeView& weight, const TensorView& row_of, const TensorView& y,
                     py::handle stream) {
  const Arguments arguments("unpermute", rows);
  ArgCheck("unpermute", "rows", rows).shape({kAny, kAny});
  ArgCheck("unpermute", "row_of", row_of).shape({kAny, kAny});
  const auto dtypes = {DataType::kBFloat16};
  UnpermuteParams params{};
  params.rows = arguments.rows("rows", rows, dtypes, rows.shape[0], rows.shape[1]);
  fill_choices(arguments, row_of, rows.shape[0], params);
  params.y = arguments.rows("y", y, dtypes, row_of.shape[0], rows.shape[1]);
  if (weight) {
    params.weight = static_cast<const float*>(
        arguments.matrix("weight", *weight, {DataType::kFloat32}, row_of.shape[0], row_of.shape[1]));
  }
  params.num_columns = static_cast<int>(rows.shape[1]);
  params.device = rows.device.index;
  throw_on_error("unpermute", unpermute(params, stream_for("unpermute", rows, stream)));
}

void bound_unpermute_backward(const TensorView& grad, const MaybeView& rows, const MaybeView& weight,
                              const TensorView& row_of, const TensorView& counts, const TensorView& offsets,
                              const TensorView& rows_grad, const MaybeView& weight_grad, py::handle stream) {
  constexpr char kOp[] = "unpermute_backward";
  const Arguments arguments(kOp, grad);
  ArgCheck(kOp, "rows_grad", rows_grad).shape({kAny, kAny});
  ArgCheck(kOp, "row_of", row_of).shape({kAny, kAny});
  if (weight_grad && !rows) throw py::value_error("unpermute_backward: rows must be given for weight_grad, got none");
  const int64_t num_rows = rows_grad.shape[0], columns = rows_grad.shape[1], tokens = row_of.shape[0];
  const auto dtypes = {DataType::kBFloat16};
  const auto floats = {DataType::kFloat32};
  UnpermuteBackwardParams params{};
  params.rows_grad = arguments.rows("rows_grad", rows_grad, dtypes, num_rows, columns);
  fill_choices(arguments, row_of, num_rows, params);
  fill_segments(arguments, counts, offsets, params);
  params.grad = arguments.rows("grad", grad, dtypes, tokens, columns);
  if (rows) params.rows = arguments.rows("rows", *rows, dtypes, num_rows, columns);
  if (weight) {
    params.weight = static_cast<const float*>(arguments.matrix("weight", *weight, floats, tokens, row_of.shape[1]));
  }
  if (weight_grad) {
    params.weight_grad =
        static_cast<float*>(arguments.matrix("weight_grad", *weight_grad, floats, tokens, row_of.shape[1]));
  }
  params.num_columns = static_cast<int>(columns);
  params.device = grad.device.index;
  throw_on_error(kOp, unpermute_backward(params, stream_for(kOp, grad, stream)));
}

}  // namespace

void bind_moe(py::module_& module) {
  const auto none = py::none();
  module.attr("max_place_blocks") = kMaxPlaceBlocks;
  module.def(
      "route", &bound_route, py::arg("logits"), py::arg("bias"), py::arg("idx"), py::arg("weight"), py::arg("scores"),
      py::arg("counts"), py::kw_only(), py::arg("num_groups"), py::arg("groups_kept"), py::arg("scale"),
      py::arg("renormalize"), py::arg("stream") = none,
      "Writes the choices of every token, their weights, all scores, and how many chose each expert, on a stream.");
  module.def("route_backward", &bound_route_backward, py::arg("weight_grad"), py::arg("scores_grad"), py::arg("scores"),
             py::arg("idx"), py::arg("logits_grad"), py::kw_only(), py::arg("scale"), py::arg("renormalize"),
             py::arg("stream") = none, "Writes the gradient of the logits, on a stream.");
  module.def("balance_loss", &bound_balance_loss, py::arg("scores"), py::arg("idx"), py::arg("cu_seqlens"),
             py::arg("loss"), py::arg("slope"), py::arg("sequence_loss"), py::arg("share_parts"), py::arg("load_parts"),
             py::arg("tickets"), py::kw_only(), py::arg("alpha"), py::arg("stream") = none,
             "Writes the loss and its slopes by sequence and expert, on a stream; the last four are scratch.");
  module.def("balance_loss_backward", &bound_balance_loss_backward, py::arg("grad"), py::arg("scores"),
             py::arg("slope"), py::arg("cu_seqlens"), py::arg("scores_grad"), py::kw_only(), py::arg("stream") = none,
             "Writes the gradient of the scores, on a stream.");
  module.def("place", &bound_place, py::arg("idx"), py::arg("row_of"), py::arg("counts"), py::arg("offsets"),
             py::arg("partial"), py::kw_only(), py::arg("block"), py::arg("stream") = none,
             "Writes the row of every choice and the experts' segments, on a stream; partial is scratch.");
  module.def("permute", &bound_permute, py::arg("x"), py::arg("row_of"), py::arg("counts"), py::arg("offsets"),
             py::arg("rows"), py::kw_only(), py::arg("scale") = none, py::arg("rows_scale") = none,
             py::arg("packed_scale") = none, py::arg("token_of_row") = none, py::arg("stream") = none,
             "Writes the rows of all segments, padding with zeros, on a stream; the last two arrays are scratch.");
  module.def("unpermute", &bound_unpermute, py::arg("rows"), py::arg("weight"), py::arg("row_of"), py::arg("y"),
             py::kw_only(), py::arg("stream") = none, "Writes every token's weighted sum of rows, on a stream.");
  module.def("unpermute_backward", &bound_unpermute_backward, py::arg("grad"), py::arg("rows"), py::arg("weight"),
             py::arg("row_of"), py::arg("counts"), py::arg("offsets"), py::arg("rows_grad"), py::arg("weight_grad"),
             py::kw_only(), py::arg("stream") = none, "Writes the gradients of rows and weights, on a stream.");
}

}  // namespace dsv3rt
