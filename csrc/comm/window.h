// What lies where in a rank's window: memory that all ranks of its node reach by plain loads and stores.
#pragma once

#include "comm/params.h"
#include "common/math.h"

namespace dsv3rt {

// A rank tells all ranks that it has finished a phase by storing the phase's epoch, which only grows.
constexpr int kNumPhases = 8;
constexpr int kChunk = 512;  // choices whose places are counted together

// A rank's own; peers leave it alone.
struct LocalState {
  uint64_t epoch[kNumPhases];    // finished by this rank
  unsigned arrived[kNumPhases];  // blocks of the running kernel
  unsigned failed;               // a wait ran out: later kernels do nothing
  unsigned reported;
};

// Byte offsets from a window's start, multiples of 128.
struct WindowLayout {
  int64_t signals;       // u64 [phase][rank]: the epoch that a peer has finished
  int64_t overflows;  // i64 [rank][2]: rows that a peer's experts needed, and its capacity; zeros where it sufficed
  int64_t local;  // LocalState
  // What a rank stages for others, in one piece up to `slots`: it lies in other nodes' inboxes as it lies here.
  int64_t num_tokens;  // i32
  int64_t choice;  // u32 [T * K]: expert << 16 | place among its expert's choices of the chunk
  int64_t chunk_starts;  // i32 [chunk][E]: its expert's choices of this rank in earlier chunks
  int64_t totals;  // i32 [E]: choices of this rank
  int64_t weight;  // f32 [T * K]
  int64_t weight_grad;  // f32 [T * K], written by the ranks that hold the experts
  int64_t tokens;  // [T] rows, each followed by its scales
  int64_t slots;  // bf16 [T * K][D]: the experts' results, written by the ranks that hold them
  int64_t rooms;  // bf16 [kNumRooms][max_rows][D]: results of this rank's experts, read by their tokens' ranks
  int64_t room_bytes;  // of one
  int64_t row_weight_grad;  // f32 [max_rows], read likewise
  // Of the low-latency form, each twice: for epochs of even and of odd number.
  int64_t arrived_choice;  // u32 [2][R][T * K, padded]: all choices of every rank
  int64_t arrived_tokens;  // [2][R][T] rows in FP8, each followed by its scales
  int64_t returned_slots;  // bf16 [2][T * K][D]
  int64_t bytes;
};

// Where several nodes make up the group: more of the window, each part once for every other node.
struct RailLayout {
  int64_t inbox;  // what the node's rank on this rail has staged
  int64_t inbox_bytes;  // of one node
  int64_t outbox;  // bf16 [T * K][D]: what goes back to that rank from all experts here
  int64_t outbox_bytes;
  int64_t returned_weight_grad;  // f32 [T * K], from that node's experts
  int64_t bytes;  // of the whole window
};

constexpr uint32_t kNoExpert = 0xffffffff;

DSV3RT_HOST_DEVICE inline int padded_choices(const EpShape& shape) {
  return round_up(shape.max_tokens * shape.top_k, 32);
}

DSV3RT_HOST_DEVICE inline int latency_record_bytes(const EpShape& shape) {
  return round_up(shape.num_columns + shape.num_columns / 128 * 4, 16);
}

// A set of ranks: first, first + stride, and so on.
struct Ranks {
  int first, count, stride;
};

// Where a rank stands. Ranks of a node reach each other's memory and have consecutive numbers; ranks of one index in
// their nodes are a rail, and only they put to each other between nodes.
struct Nodes {
  int count, size;  // all of one size
  int node, rail;   // this rank's node, and its index there
};

DSV3RT_HOST_DEVICE inline Nodes nodes_of(const EpShape& shape, int node_size) {
  return {shape.num_ranks / node_size, node_size, shape.rank / node_size, shape.rank % node_size};
}

DSV3RT_HOST_DEVICE inline Ranks everyone(const Nodes& nodes) { return {0, nodes.count * nodes.size, 1}; }
DSV3RT_HOST_DEVICE inline Ranks node_mates(const Nodes& nodes) { return {nodes.node * nodes.size, nodes.size, 1}; }
DSV3RT_HOST_DEVICE inline Ranks rail_mates(const Nodes& nodes) { return {nodes.rail, nodes.count, nodes.size}; }

// Which of `owner`'s areas for other nodes is that for `other`.
DSV3RT_HOST_DEVICE inline int area_of(int owner, int other) { return other - (other > owner ? 1 : 0); }

// A route's words: bits of a rank's choices, K words for 32 tokens. First for every node those that go there, then for
// every node those of its rank on this rail that come here.
DSV3RT_HOST_DEVICE inline int rail_words(const EpShape& shape) { return ceil_div(shape.max_tokens, 32) * shape.top_k; }

// Takes parts of a window, one after the other.
class Areas {
 public:
  explicit Areas(int64_t start) : end_(start) {}

  int64_t take(int64_t bytes) {
    const int64_t start = end_;
    end_ += round_up(bytes, int64_t(128));
    return start;
  }

  int64_t window_bytes() const { return round_up(end_, int64_t(4096)); }  // as NCCL asks

 private:
  int64_t end_;
};

inline WindowLayout layout_of(const EpShape& shape) {
  WindowLayout at{};
  Areas areas(0);
  const int64_t choices = int64_t(shape.max_tokens) * shape.top_k;
  at.signals = areas.take(int64_t(kNumPhases) * kMaxEpRanks * 8);
  at.overflows = areas.take(int64_t(kMaxEpRanks) * 16);
  at.local = areas.take(sizeof(LocalState));
  at.num_tokens = areas.take(4);
  at.choice = areas.take(choices * 4);
  at.chunk_starts = areas.take(ceil_div(choices, int64_t(kChunk)) * shape.num_experts * 4);
  at.totals = areas.take(int64_t(shape.num_experts) * 4);
  at.weight = areas.take(choices * 4);
  at.weight_grad = areas.take(choices * 4);
  at.tokens = areas.take(int64_t(shape.max_tokens) * shape.num_columns * 2);
  at.slots = areas.take(choices * shape.num_columns * 2);
  at.room_bytes = round_up(int64_t(shape.max_rows) * shape.num_columns * 2, int64_t(128));
  at.rooms = areas.take(kNumRooms * at.room_bytes);
  at.row_weight_grad = areas.take(int64_t(shape.max_rows) * 4);
  if (shape.low_latency) {
    const int64_t ranks = shape.num_ranks;
    at.arrived_choice = areas.take(2 * ranks * padded_choices(shape) * 4);
    at.arrived_tokens = areas.take(2 * ranks * shape.max_tokens * latency_record_bytes(shape));
    at.returned_slots = areas.take(2 * choices * shape.num_columns * 2);
  }
  at.bytes = areas.window_bytes();
  return at;
}

DSV3RT_HOST_DEVICE inline int64_t room_offset(const WindowLayout& at, EpRoom room) {
  return at.rooms + int(room) * at.room_bytes;
}

// Behind the parts that a window of one node has.
inline RailLayout rail_layout_of(const EpShape& shape, const WindowLayout& at, int num_nodes) {
  RailLayout rails{};
  Areas areas(at.bytes);
  const int64_t others = num_nodes - 1, choices = int64_t(shape.max_tokens) * shape.top_k;
  rails.inbox_bytes = at.slots - at.num_tokens;
  rails.outbox_bytes = round_up(choices * shape.num_columns * 2, int64_t(128));
  rails.inbox = areas.take(others * rails.inbox_bytes);
  rails.outbox = areas.take(others * rails.outbox_bytes);
  rails.returned_weight_grad = areas.take(others * choices * 4);
  rails.bytes = areas.window_bytes();
  return rails;
}

// What every kernel needs of the group. `self` is the address under which peers' tables know this window too: two
// addresses of one memory would not be coherent inside a kernel.
struct Team {
  char* self;
  char* const* peers;  // on the device: windows of all ranks, or of this node's
  EpError* error;  // in host memory
  WindowLayout at;
  EpShape shape;
  int64_t timeout_ns;
};

// The same where not all ranks reach each other. Kernels for one node take a Team and know nothing of this.
struct NodesTeam : Team {
  Nodes nodes;
  RailLayout rails;
};

}  // namespace dsv3rt
