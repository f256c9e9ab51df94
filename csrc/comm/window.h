// What lies where in a rank's window: memory that all ranks of the team reach by plain loads and stores.
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
  int64_t num_tokens;  // i32
  int64_t choice;  // u32 [T * K]: expert << 16 | place among its expert's choices of the chunk
  int64_t chunk_starts;  // i32 [chunk][E]: its expert's choices of this rank in earlier chunks
  int64_t totals;  // i32 [E]: choices of this rank
  int64_t weight;  // f32 [T * K]
  int64_t weight_grad;  // f32 [T * K], written by the ranks that hold the experts
  int64_t tokens;  // [T] rows, each followed by its scales
  int64_t slots;  // bf16 [T * K][D]: the experts' results, written by the ranks that hold them
  // Of the low-latency form, each twice: for epochs of even and of odd number.
  int64_t arrived_choice;  // u32 [2][R][T * K, padded]: all choices of every rank
  int64_t arrived_tokens;  // [2][R][T] rows in FP8, each followed by its scales
  int64_t returned_slots;  // bf16 [2][T * K][D]
  int64_t bytes;
};

constexpr uint32_t kNoExpert = 0xffffffff;

DSV3RT_HOST_DEVICE inline int padded_choices(const EpShape& shape) {
  return round_up(shape.max_tokens * shape.top_k, 32);
}

DSV3RT_HOST_DEVICE inline int latency_record_bytes(const EpShape& shape) {
  return round_up(shape.num_columns + shape.num_columns / 128 * 4, 16);
}

inline WindowLayout layout_of(const EpShape& shape) {
  WindowLayout at{};
  const auto take = [&](int64_t bytes) {
    const int64_t start = at.bytes;
    at.bytes += round_up(bytes, int64_t(128));
    return start;
  };
  const int64_t choices = int64_t(shape.max_tokens) * shape.top_k;
  at.signals = take(int64_t(kNumPhases) * kMaxEpRanks * 8);
  at.overflows = take(int64_t(kMaxEpRanks) * 16);
  at.local = take(sizeof(LocalState));
  at.num_tokens = take(4);
  at.choice = take(choices * 4);
  at.chunk_starts = take(ceil_div(choices, int64_t(kChunk)) * shape.num_experts * 4);
  at.totals = take(int64_t(shape.num_experts) * 4);
  at.weight = take(choices * 4);
  at.weight_grad = take(choices * 4);
  at.tokens = take(int64_t(shape.max_tokens) * shape.num_columns * 2);
  at.slots = take(choices * shape.num_columns * 2);
  if (shape.low_latency) {
    const int64_t ranks = shape.num_ranks;
    at.arrived_choice = take(2 * ranks * padded_choices(shape) * 4);
    at.arrived_tokens = take(2 * ranks * shape.max_tokens * latency_record_bytes(shape));
    at.returned_slots = take(2 * choices * shape.num_columns * 2);
  }
  at.bytes = round_up(at.bytes, int64_t(4096));  // what NCCL asks of a window
  return at;
}

// What every kernel needs of the group. `self` is the address under which peers' tables know this window too: two
// addresses of one memory would not be coherent inside a kernel.
struct Team {
  char* self;
  char* const* peers;  // (R,) on the device
  EpError* error;  // in host memory
  WindowLayout at;
  EpShape shape;
  int64_t timeout_ns;
};

}  // namespace dsv3rt
