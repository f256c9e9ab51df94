// Combine between nodes: `push` writes rows into slots of this node's ranks and into outboxes for other nodes,
// `put_slots` (sm90_ep_rails.cuh) sends those on, `reduce` sums a token's slots.
#pragma once

#include "comm/nodes.cuh"
#include "comm/sm90_ep_sum.cuh"

namespace dsv3rt {

struct PushArgs {
  EpRoute route;
  const char* rows;  // (P, D) BF16
};

__global__ void __launch_bounds__(kThreads)
    ep_push_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ PushArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kPush);
  const int row_bytes = team.shape.num_columns * 2;
  if (await_mates(team, EpPhase::kReduce, epoch - 1)) {  // the slots have been read
    const int num_rows = __ldg(args.route.offsets + team.shape.num_experts / team.shape.num_ranks);
    const int max_choices = team.shape.max_tokens * team.shape.top_k;
    for (int i = warp_in_grid(); i < num_rows; i += warps_in_grid()) {
      const int row = __ldg(args.route.order + i), origin = __ldg(args.route.origin + row);
      if (origin < 0) continue;
      char* slot = slots_towards(team, origin / max_choices) + int64_t(origin % max_choices) * row_bytes;
      copy_row(reinterpret_cast<uint4*>(slot), reinterpret_cast<const uint4*>(args.rows + int64_t(row) * row_bytes),
               row_bytes / 16, threadIdx.x % 32);
    }
  }
  if (!is_last_block(team, EpPhase::kPush)) return;
  for (int peer = threadIdx.x; peer < num_mates(team); peer += kThreads) tell_overflow(team, args.route, peer);
  tell_peers(team, EpPhase::kPush, epoch);
}

__global__ void __launch_bounds__(kThreads)
    ep_reduce_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ SumArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kReduce);
  const bool fine = await_mates_and_rails(team, EpPhase::kPush, epoch);
  bool fits = true;
  for (int peer = threadIdx.x; peer < team.shape.num_ranks; peer += kThreads) fits = had_room(team, peer) && fits;
  const bool complete = __syncthreads_and(fits) && fine;
  const auto* slots = in_window<const uint4>(team.self, team.at.slots);
  const int parts = ceil_div(team.shape.num_columns, kPartColumns);
  for (int item = warp_in_grid(); item < args.num_tokens * parts; item += warps_in_grid()) {
    if (complete) {
      sum_part(team, args, slots, item / parts, item % parts);
    } else {
      spoil_part(team, args, item / parts, item % parts);
    }
  }
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
