#include "comm/bind.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "comm/params.h"
#include "common/arg_check.h"
#include "common/dlpack_caster.h"

namespace py = pybind11;

namespace dsv3rt {
namespace {

using OptionalView = std::optional<TensorView>;

constexpr char kDispatch[] = "ep_dispatch";
constexpr char kCombine[] = "ep_combine";
constexpr char kSend[] = "ep_send";
constexpr char kReceive[] = "ep_receive";
constexpr char kSendBack[] = "ep_send_back";
constexpr char kCollect[] = "ep_collect";

std::string version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

py::dict nccl_info() {
  int compiled = 0, loaded = 0;
  const char* problem = ep_nccl_version(&compiled, &loaded);
  py::dict info;
  info["compiled"] = compiled ? py::object(py::str(version_text(compiled))) : py::none();
  info["loaded"] = loaded ? py::object(py::str(version_text(loaded))) : py::none();
  info["problem"] = problem ? problem : "";
  return info;
}

py::bytes unique_id() {
  uint8_t id[kUniqueIdBytes];
  throw_on_error("EpComm", ep_unique_id(id));
  return py::bytes(reinterpret_cast<const char*>(id), sizeof(id));
}

// Of one dispatch.
struct RouteViews {
  TensorView counts, offsets, origin, order, rows_needed, rails;
  int block;
};

class Comm {
 public:
  Comm(int num_ranks, int rank, int num_experts, int max_tokens, int top_k, int num_columns, int max_rows,
       const std::string& id, int device, int64_t timeout_us, bool low_latency) {
    if (id.size() != kUniqueIdBytes)
      throw py::value_error("EpComm: id must have 128 bytes, got " + std::to_string(id.size()));
    if (max_rows < 0 || max_rows >= 1 << kPlaceBits)
      throw py::value_error("EpComm: max_rows must be in 0..2^26 - 1, got " + std::to_string(max_rows));
    const EpShape shape{num_ranks, rank, num_experts, max_tokens, top_k, num_columns, max_rows, low_latency};
    EpComm* made = nullptr;
    std::string error;
    {
      const py::gil_scoped_release unlocked;  // waits for the other ranks
      const char* what = ep_create(shape, reinterpret_cast<const uint8_t*>(id.data()), device, timeout_us, &made);
      if (what != nullptr) error = what;
    }
    if (made == nullptr) throw std::runtime_error("EpComm: " + error);
    comm_.reset(made);
  }

  void dispatch(const TensorView& tokens, const RouteViews& route, const TensorView& rows,
                const OptionalView& token_scale, const OptionalView& row_scale, const OptionalView& choice,
                const OptionalView& weight, const OptionalView& outputs, const OptionalView& weight_grad,
                const OptionalView& row_weight, const OptionalView& place, int num_sms, py::handle stream) {
    EpDispatchParams params{};
    params.tokens = rows_of("tokens", tokens, kAny, token_scale);
    params.num_tokens = count_tokens(kDispatch, tokens);
    params.route = route_of(kDispatch, route);
    params.rail_words = rail_words_of(kDispatch, route);
    params.rows = rows_of("rows", rows, params.route.capacity, row_scale);
    if (choice) {
      check_choices(kDispatch, "choice", *choice, DataType::kInt64, params.num_tokens);
      params.finds_route = true;
      params.choice = static_cast<const int64_t*>(choice->data);
    }
    if (outputs) {
      if (!weight || !weight_grad) throw py::value_error("ep_dispatch: outputs must come with weight and weight_grad");
      check_choices(kDispatch, "weight", *weight, DataType::kFloat32, params.num_tokens);
      check_choices(kDispatch, "weight_grad", *weight_grad, DataType::kFloat32, params.num_tokens);
      check_dense(kDispatch, "outputs", *outputs, params.route.capacity);
      params.weight = static_cast<const float*>(weight->data);
      params.weight_grad = static_cast<float*>(weight_grad->data);
      params.outputs = outputs->data;
    }
    if (row_weight) {
      if (!choice || !weight || !place) {
        throw py::value_error("ep_dispatch: row_weight must come with choice, weight and place");
      }
      check_choices(kDispatch, "weight", *weight, DataType::kFloat32, params.num_tokens);
      check_choices(kDispatch, "place", *place, DataType::kInt32, params.num_tokens);
      check_by_row(kDispatch, "row_weight", *row_weight, params.route.capacity);
      params.weight = static_cast<const float*>(weight->data);
      params.row_weight = static_cast<float*>(row_weight->data);
      params.place = static_cast<uint32_t*>(place->data);
    }
    params.num_sms = num_sms;
    throw_on_error(kDispatch, ep_dispatch(get(), params, stream_for(kDispatch, tokens, stream)));
  }

  void combine(const TensorView& rows, const RouteViews& route, const TensorView& tokens, const OptionalView& weight,
               int num_sms, py::handle stream) {
    EpCombineParams params{};
    params.route = route_of(kCombine, route);
    params.rail_words = rail_words_of(kCombine, route);
    check_dense(kCombine, "rows", rows, params.route.capacity);
    check_dense(kCombine, "tokens", tokens, kAny);
    params.rows = rows.data;
    params.tokens = tokens.data;
    params.num_tokens = static_cast<int>(tokens.shape[0]);
    params.room = EpRoom::kNone;
    if (weight) {
      check_choices(kCombine, "weight", *weight, DataType::kFloat32, params.num_tokens);
      params.weight = static_cast<const float*>(weight->data);
    }
    params.num_sms = num_sms;
    throw_on_error(kCombine, ep_combine(get(), params, stream_for(kCombine, rows, stream)));
  }

  // Rows lie in `room` already, from `first_row` on.
  void fetch(int room, int64_t first_row, const RouteViews& route, const TensorView& place, const TensorView& tokens,
             const OptionalView& row_weight_grad, const OptionalView& weight_grad, int num_sms, py::handle stream) {
    EpCombineParams params{};
    params.room = room_of(room);
    params.route = route_of(kCombine, route);
    params.first_row = first_row;
    const int64_t most = ep_shape(get()).max_rows - params.route.capacity;
    if (first_row < 0 || first_row > most)
      throw py::value_error("ep_combine: first_row must be in 0.." + std::to_string(most) + ", got " +
                            std::to_string(first_row));
    check_dense(kCombine, "tokens", tokens, kAny);
    params.tokens = tokens.data;
    params.num_tokens = static_cast<int>(tokens.shape[0]);
    check_choices(kCombine, "place", place, DataType::kInt32, params.num_tokens);
    params.place = static_cast<const uint32_t*>(place.data);
    if (row_weight_grad) {
      if (!weight_grad) throw py::value_error("ep_combine: row_weight_grad must come with weight_grad");
      check_by_row(kCombine, "row_weight_grad", *row_weight_grad, params.route.capacity);
      check_choices(kCombine, "weight_grad", *weight_grad, DataType::kFloat32, params.num_tokens);
      params.row_weight_grad = static_cast<const float*>(row_weight_grad->data);
      params.weight_grad = static_cast<float*>(weight_grad->data);
    }
    params.num_sms = num_sms;
    throw_on_error(kCombine, ep_combine(get(), params, stream_for(kCombine, tokens, stream)));
  }

  void send(const TensorView& tokens, const TensorView& choice, int num_sms, py::handle stream) {
    check_dense(kSend, "tokens", tokens, kAny);
    EpSendParams params{tokens.data, static_cast<const int64_t*>(choice.data), count_tokens(kSend, tokens), num_sms};
    check_choices(kSend, "choice", choice, DataType::kInt64, params.num_tokens);
    throw_on_error(kSend, ep_send(get_latency(), params, stream_for(kSend, tokens, stream)));
  }

  void receive(const TensorView& counts, const TensorView& origin, const TensorView& rows, const TensorView& row_scale,
               int num_sms, py::handle stream) {
    const EpReceiveParams params{masked_route_of(kReceive, counts, origin),
                                 rows_of("rows", rows, origin.shape[0], row_scale), num_sms};
    throw_on_error(kReceive, ep_receive(get_latency(), params, stream_for(kReceive, rows, stream)));
  }

  void send_back(const TensorView& rows, const TensorView& counts, const TensorView& origin, int num_sms,
                 py::handle stream) {
    const EpMaskedRoute route = masked_route_of(kSendBack, counts, origin);
    check_dense(kSendBack, "rows", rows, origin.shape[0]);
    const EpSendBackParams params{rows.data, route, num_sms};
    throw_on_error(kSendBack, ep_send_back(get_latency(), params, stream_for(kSendBack, rows, stream)));
  }

  void collect(const TensorView& tokens, const OptionalView& weight, int num_sms, py::handle stream) {
    check_dense(kCollect, "tokens", tokens, kAny);
    EpCollectParams params{nullptr, tokens.data, count_tokens(kCollect, tokens), num_sms};
    if (weight) {
      check_choices(kCollect, "weight", *weight, DataType::kFloat32, params.num_tokens);
      params.weight = static_cast<const float*>(weight->data);
    }
    throw_on_error(kCollect, ep_collect(get_latency(), params, stream_for(kCollect, tokens, stream)));
  }

  // None, or (fault, phase, peer, expected, seen).
  py::object error() const {
    const EpError error = ep_error(get());
    if (!error.is_complete) return py::none();
    return py::make_tuple(int(error.fault), int(error.phase), error.peer, error.expected, error.seen);
  }

  int64_t window_bytes() const { return ep_window_bytes(get()); }
  uintptr_t room_address(int room) const { return reinterpret_cast<uintptr_t>(ep_room(get(), room_of(room))); }
  int num_nodes() const { return ep_num_nodes(get()); }
  int64_t rail_words() const { return ep_rail_words(get()); }

  void destroy() {
    const py::gil_scoped_release unlocked;
    comm_.reset();
  }

 private:
  struct Destroy {
    void operator()(EpComm* comm) const { ep_destroy(comm); }
  };

  EpComm* get() const {
    if (!comm_) throw std::runtime_error("EpComm: must not be used after destroy()");
    return comm_.get();
  }

  EpComm* get_latency() const {
    if (!ep_shape(get()).low_latency)
      throw py::value_error("EpComm: must be made with low_latency, got a group without");
    return get();
  }

  void check_choices(const char* op, const char* name, const TensorView& view, DataType type, int num_tokens) const {
    const int64_t top_k = ep_shape(get()).top_k;
    ArgCheck(op, name, view).on_cuda().dtype({type}).shape({num_tokens, top_k}).strides({top_k, 1});
  }

  // (num_rows, D) in BF16, contiguous.
  void check_dense(const char* op, const char* name, const TensorView& view, int64_t num_rows) const {
    const int64_t columns = ep_shape(get()).num_columns;
    const ArgCheck check(op, name, view);
    check.on_cuda().dtype({DataType::kBFloat16}).shape({num_rows, columns}).strides({columns, 1}).aligned(16);
  }

  void check_by_row(const char* op, const char* name, const TensorView& view, int64_t num_rows) const {
    ArgCheck(op, name, view).on_cuda().dtype({DataType::kFloat32}).shape({num_rows}).strides({1});
    const int most = ep_shape(get()).max_rows;
    if (num_rows > most) {
      ArgCheck(op, name, view)
          .fail("must have at most " + std::to_string(most) + " rows, a room's", std::to_string(num_rows));
    }
  }

  EpRoom room_of(int room) const {
    if (room < 0 || room >= kNumRooms || ep_shape(get()).max_rows == 0)
      throw py::value_error("EpComm: room must be one that the group has, got " + std::to_string(room));
    return static_cast<EpRoom>(room);
  }

  int count_tokens(const char* op, const TensorView& tokens) const {
    const int most = ep_shape(get()).max_tokens;
    if (tokens.shape[0] > most) {
      ArgCheck(op, "tokens", tokens)
          .fail("must have at most " + std::to_string(most) + " rows", std::to_string(tokens.shape[0]));
    }
    return static_cast<int>(tokens.shape[0]);
  }

  EpMaskedRoute masked_route_of(const char* op, const TensorView& counts, const TensorView& origin) const {
    const EpShape& shape = ep_shape(get());
    const int64_t num_local = shape.num_experts / shape.num_ranks;
    ArgCheck(op, "counts", counts).on_cuda().dtype({DataType::kInt32}).shape({num_local}).strides({1});
    const ArgCheck check(op, "origin", origin);
    check.on_cuda().dtype({DataType::kInt32}).shape({kAny}).strides({1});
    if (origin.shape[0] % num_local != 0) {
      check.fail("must have equally many rows for each expert", std::to_string(origin.shape[0]));
    }
    return {static_cast<int*>(counts.data), static_cast<int*>(origin.data),
            static_cast<int>(origin.shape[0] / num_local)};
  }

  EpRoute route_of(const char* op, const RouteViews& route) const {
    const EpShape& shape = ep_shape(get());
    const int64_t num_local = shape.num_experts / shape.num_ranks;
    const auto check = [&](const char* name, const TensorView& view, int64_t extent) {
      ArgCheck(op, name, view).on_cuda().dtype({DataType::kInt32}).shape({extent}).strides({1});
    };
    check("counts", route.counts, num_local);
    check("offsets", route.offsets, num_local + 1);
    check("origin", route.origin, kAny);
    check("order", route.order, route.origin.shape[0]);
    check("rows_needed", route.rows_needed, 1);
    return {static_cast<int*>(route.counts.data),
            static_cast<int*>(route.offsets.data),
            static_cast<int*>(route.origin.data),
            static_cast<int*>(route.order.data),
            static_cast<int*>(route.rows_needed.data),
            route.origin.shape[0],
            route.block};
  }

  uint32_t* rail_words_of(const char* op, const RouteViews& route) const {
    ArgCheck(op, "rails", route.rails).on_cuda().dtype({DataType::kInt32}).shape({rail_words()}).strides({1});
    return static_cast<uint32_t*>(route.rails.data);
  }

  EpRows rows_of(const char* name, const TensorView& view, int64_t num_rows, const OptionalView& scale) const {
    const int64_t columns = ep_shape(get()).num_columns, item = scale ? 1 : 2;
    const ArgCheck check(kDispatch, name, view);
    check.on_cuda().dtype({scale ? DataType::kUInt8 : DataType::kBFloat16}).shape({num_rows, columns});
    check.strides({kAny, 1}).stride_multiple_of(0, 16 / item).aligned(16);
    EpRows rows{};
    rows.data = view.data;
    rows.row_stride = view.strides[0] * item;
    rows.row_bytes = static_cast<int>(columns * item);
    if (scale) {
      ArgCheck(kDispatch, "scale", *scale)
          .on_cuda()
          .dtype({DataType::kFloat32})
          .shape({view.shape[0], (columns + 127) / 128});
      ArgCheck(kDispatch, "scale", *scale).strides({1, kAny});
      rows.scale = static_cast<float*>(scale->data);
      rows.scale_stride = scale->strides[1];
      rows.num_scales = static_cast<int>(scale->shape[1]);
    }
    return rows;
  }

  std::unique_ptr<EpComm, Destroy> comm_;
};

}  // namespace

void bind_comm(py::module_& module) {
  const auto none = py::none();
  module.def("ep_nccl_info", &nccl_info, "NCCL's versions at build time and in this process, and what is wrong.");
  module.def("ep_unique_id", &unique_id, "The id with which the ranks of a new communicator find each other.");
  py::class_<RouteViews>(module, "EpRoute", "Where rows of one dispatch came from; keeps no array alive.")
      .def(py::init([](const TensorView& counts, const TensorView& offsets, const TensorView& origin,
                       const TensorView& order, const TensorView& rows_needed, const TensorView& rails,
                       int block) { return RouteViews{counts, offsets, origin, order, rows_needed, rails, block}; }),
           py::arg("counts"), py::arg("offsets"), py::arg("origin"), py::arg("order"), py::arg("rows_needed"),
           py::arg("rails"), py::arg("block"));
  py::class_<Comm>(module, "EpComm", "One rank of a group that exchanges rows; made and destroyed by all together.")
      .def(py::init<int, int, int, int, int, int, int, const std::string&, int, int64_t, bool>(), py::arg("num_ranks"),
           py::arg("rank"), py::arg("num_experts"), py::arg("max_tokens"), py::arg("top_k"), py::arg("num_columns"),
           py::arg("max_rows"), py::arg("id"), py::arg("device"), py::arg("timeout_us"), py::arg("low_latency"))
      .def("dispatch", &Comm::dispatch, py::arg("tokens"), py::arg("route"), py::arg("rows"), py::kw_only(),
           py::arg("token_scale") = none, py::arg("row_scale") = none, py::arg("choice") = none,
           py::arg("weight") = none, py::arg("outputs") = none, py::arg("weight_grad") = none,
           py::arg("row_weight") = none, py::arg("place") = none, py::arg("num_sms"), py::arg("stream") = none,
           "Writes rows, and the route unless it is known already, on a stream.")
      .def("combine", &Comm::combine, py::arg("rows"), py::arg("route"), py::arg("tokens"), py::kw_only(),
           py::arg("weight") = none, py::arg("num_sms"), py::arg("stream") = none,
           "Sums every token's rows into tokens, on a stream.")
      .def("fetch", &Comm::fetch, py::arg("room"), py::arg("first_row"), py::arg("route"), py::arg("place"),
           py::arg("tokens"), py::kw_only(), py::arg("row_weight_grad") = none, py::arg("weight_grad") = none,
           py::arg("num_sms"), py::arg("stream") = none, "Sums every token's rows, which lie in a room of their ranks.")
      .def("send", &Comm::send, py::arg("tokens"), py::arg("choice"), py::kw_only(), py::arg("num_sms"),
           py::arg("stream") = none, "Casts tokens to FP8 and writes them to their experts' ranks.")
      .def("receive", &Comm::receive, py::arg("counts"), py::arg("origin"), py::arg("rows"), py::arg("row_scale"),
           py::kw_only(), py::arg("num_sms"), py::arg("stream") = none, "Lays out the rows that were sent here.")
      .def("send_back", &Comm::send_back, py::arg("rows"), py::arg("counts"), py::arg("origin"), py::kw_only(),
           py::arg("num_sms"), py::arg("stream") = none, "Writes rows to the ranks of their tokens.")
      .def("collect", &Comm::collect, py::arg("tokens"), py::kw_only(), py::arg("weight") = none, py::arg("num_sms"),
           py::arg("stream") = none, "Sums every token's rows, as combine does.")
      .def("error", &Comm::error, "None, or (fault, phase, peer, expected, seen) of the first fault.")
      .def("window_bytes", &Comm::window_bytes)
      .def("room_address", &Comm::room_address, py::arg("room"),
           "Where (max_rows, D) BF16 of a room lie; 0: results of experts, 1: gradients of their inputs.")
      .def("num_nodes", &Comm::num_nodes, "Groups of ranks that reach each other's memory.")
      .def("rail_words", &Comm::rail_words, "Elements of a route's `rails`; 0 within one node.")
      .def("destroy", &Comm::destroy);
}

}  // namespace dsv3rt
