// Combine in two kernels: `push` writes every row into the slot of its choice at the rank it came from, `reduce` sums a
// token's slots in the order of k, in FP32. Between nodes `put_slots` (sm90_ep_rails.cuh) sends rows on in between.
#pragma once

#include "comm/sm90_ep_sum.cuh"

namespace dsv3rt {

struct PushArgs {
  EpRoute route;
  const char* rows;  // (P, D) BF16
};

struct ReduceArgs {
  const float* weight;
  __nv_bfloat16* tokens;
  int num_tokens;
};

// Tells this node's ranks whether this rank's rows had room; of them all have to know before they sum.
template <typename AnyTeam>
__device__ inline void tell_overflow(const AnyTeam& team, const EpRoute& route) {
  const int needed = __ldg(route.rows_needed);
  const bool overflowed = needed > route.capacity;
  for (int peer = threadIdx.x; peer < num_mates(team); peer += kThreads) {
    int64_t* told = in_window<int64_t>(team.peers[peer], team.at.overflows) + 2 * team.shape.rank;
    told[0] = overflowed ? needed : 0;
    told[1] = overflowed ? route.capacity : 0;
  }
}

template <typename AnyTeam>
__global__ void __launch_bounds__(kThreads)
    ep_push_kernel(const __grid_constant__ AnyTeam team, const __grid_constant__ PushArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kPush);
  const int row_bytes = team.shape.num_columns * 2;
  if (await_mates(team, EpPhase::kReduce, epoch - 1)) {  // the slots have been read
    const int num_rows = __ldg(args.route.offsets + team.shape.num_experts / team.shape.num_ranks);
    const int max_choices = team.shape.max_tokens * team.shape.top_k;
    const auto find_slot_of_row = [&](int row) -> const char* {
      const int origin = row < 0 ? -1 : __ldg(args.route.origin + row);
      if (origin < 0) return nullptr;
      return slots_towards(team, origin / max_choices) + int64_t(origin % max_choices) * row_bytes;
    };
    in_turns(num_rows, find_slot_of_row, [&](int row, const char* found, int turn) {
      char* slot = address_of_lane(found, turn);
      if (slot == nullptr) return;
      copy_row(reinterpret_cast<uint4*>(slot), reinterpret_cast<const uint4*>(args.rows + int64_t(row) * row_bytes),
               row_bytes / 16, threadIdx.x % 32);
    });
  }
  if (!is_last_block(team, EpPhase::kPush)) return;
  tell_overflow(team, args.route);
  tell_peers(team, EpPhase::kPush, epoch);
}

// Whether all of a token's slots were written by all peers.
__device__ inline bool all_arrived(const Team& team) {
  bool fine = true;
  for (int peer = threadIdx.x; peer < team.shape.num_ranks; peer += kThreads) {
    const int64_t* told = in_window<int64_t>(team.self, team.at.overflows) + 2 * peer;
    const int64_t needed = __ldcg(told);
    if (needed == 0) continue;
    fail(team, {0, EpFault::kPeerOverflow, EpPhase::kReduce, peer, __ldcg(told + 1), needed});
    fine = false;
  }
  return __syncthreads_and(fine);
}

// Of a token's slots [T * K][D] that from `first` on which the lane has to find.
__device__ __forceinline__ FoundRow find_slot(const Team& team, const ReduceArgs& args, const uint4* slots, int token,
                                              int first) {
  const int lane = threadIdx.x % 32, k = first + lane, top_k = team.shape.top_k;
  if (lane >= kSumRows || k >= top_k) return {nullptr, 0.0f};
  const int choice = token * top_k + k;
  return {slots + int64_t(choice) * (team.shape.num_columns / 8),
          args.weight != nullptr ? __ldg(args.weight + choice) : 1.0f};
}

__device__ inline void reduce_token(const Team& team, const ReduceArgs& args, const uint4* slots, int token, int start,
                                    int end) {
  sum_token<true>(team, args.tokens, token, start, end,
                  [&](int first) { return find_slot(team, args, slots, token, first); });
}

template <typename AnyTeam>
__global__ void __launch_bounds__(kThreads)
    ep_reduce_kernel(const __grid_constant__ AnyTeam team, const __grid_constant__ ReduceArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kReduce);
  const bool fine = await_mates_and_rails(team, EpPhase::kPush, epoch);
  const bool complete = all_arrived(team) && fine;
  const auto* slots = in_window<const uint4>(team.self, team.at.slots);
  const int num_vectors = team.shape.num_columns / 8;
  for (int token = warp_in_grid(); token < args.num_tokens; token += warps_in_grid()) {
    if (complete) {
      reduce_token(team, args, slots, token, 0, num_vectors);
    } else {
      spoil_token(team, args.tokens, token, 0, num_vectors);
    }
  }
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
