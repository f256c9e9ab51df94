// Combine in two kernels: `push` writes every row into the slot of its choice at the rank it came from, `reduce` sums a
// token's slots in the order of k, in FP32. Between nodes `put_slots` (sm90_ep_rails.cuh) sends rows on in between.
#pragma once

#include <cuda_bf16.h>

#include "comm/team.cuh"
#include "common/bf16_pack.cuh"

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
    for (int row = warp_in_grid(); row < num_rows; row += warps_in_grid()) {
      const int origin = __ldg(args.route.origin + row);
      if (origin < 0) continue;
      char* slot = slots_towards(team, origin / max_choices) + int64_t(origin % max_choices) * row_bytes;
      copy_row(reinterpret_cast<uint4*>(slot), reinterpret_cast<const uint4*>(args.rows + int64_t(row) * row_bytes),
               row_bytes / 16, threadIdx.x % 32);
    }
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

// Fused, as the reference's addcmul is.
__device__ __forceinline__ void add_slot(float (&sum)[8], uint4 slot, float weight) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&slot);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    sum[2 * i] = fmaf(pair.x, weight, sum[2 * i]);
    sum[2 * i + 1] = fmaf(pair.y, weight, sum[2 * i + 1]);
  }
}

// NaN, where an error was reported; nobody may take what is there for a result. One warp's work.
__device__ inline void spoil_token(const Team& team, __nv_bfloat16* tokens, int token) {
  const int num_vectors = team.shape.num_columns / 8;
  auto* target = reinterpret_cast<uint4*>(tokens) + int64_t(token) * num_vectors;
  for (int i = threadIdx.x % 32; i < num_vectors; i += 32) target[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
}

// Eight columns of a token, from slots [T * K][D].
__device__ __forceinline__ void reduce_column(const Team& team, const ReduceArgs& args, const uint4* slots, int token,
                                              int column) {
  constexpr int kUnroll = 4;
  const int num_vectors = team.shape.num_columns / 8, top_k = team.shape.top_k;
  const uint4* slot = slots + int64_t(token) * top_k * num_vectors + column;
  float sum[8] = {};
  for (int first = 0; first < top_k; first += kUnroll) {
    uint4 held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i < top_k) held[i] = load_shared_memory(slot + int64_t(first + i) * num_vectors);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i >= top_k) continue;
      add_slot(sum, held[i], args.weight != nullptr ? __ldg(args.weight + token * top_k + first + i) : 1.0f);
    }
  }
  reinterpret_cast<uint4*>(args.tokens)[int64_t(token) * num_vectors + column] = pack_bf16(sum);
}

template <typename AnyTeam>
__global__ void __launch_bounds__(kThreads)
    ep_reduce_kernel(const __grid_constant__ AnyTeam team, const __grid_constant__ ReduceArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kReduce);
  const bool fine = await_mates_and_rails(team, EpPhase::kPush, epoch);
  const bool complete = all_arrived(team) && fine;
  const auto* slots = in_window<const uint4>(team.self, team.at.slots);
  const int lane = threadIdx.x % 32, num_vectors = team.shape.num_columns / 8;
  for (int token = warp_in_grid(); token < args.num_tokens; token += warps_in_grid()) {
    if (complete) {
      for (int column = lane; column < num_vectors; column += 32) reduce_column(team, args, slots, token, column);
    } else {
      spoil_token(team, args.tokens, token);
    }
  }
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
