// Combine within a node, one kernel: the first warps of a block push rows into the slots of their choices at the ranks
// that they came from, the others sum slots as they arrive, and the first help when they have done. Rows leave in the
// order of their tokens and not far ahead of the sums, so that a token's slots fill at about the same time everywhere
// and are read while they are still in the L2.
//
// A slot's piece is there once its flag holds the epoch. Slots are written again after all of their rank's sums.
//
// No wait is in a circle. Steps number choices of all ranks. Sums of a step await pieces of that step, a piece awaits
// that its block has begun sums of a step not long before its own; so whoever is at the earliest step waits for nobody.
#pragma once

#include <climits>

#include "comm/copier.cuh"
#include "comm/sm90_ep_place.cuh"
#include "comm/sm90_ep_sum.cuh"

namespace dsv3rt {

struct CombineArgs {
  EpRoute route;
  const char* rows;  // (P, D) BF16
  SumArgs sum;
};

struct CombineStorage {
  CopierStorage copiers;
  int sums_begun;  // of this block
};

constexpr int kStepsAhead = 8;  // of pieces ahead of sums

// A step's choices of each rank: as many as have their places in the order of rows together.
__device__ __forceinline__ int step_of(const Team& team, int choice) {
  return choice / (team.shape.num_ranks <= kTurns ? 32 : kChunk);
}

__device__ __forceinline__ uint64_t* arrival_of(const Team& team, char* window, int token, int piece) {
  const int pieces = num_pieces(team.shape.num_columns * 2);
  return in_window<uint64_t>(window, team.at.arrived) + (int64_t(token) * pieces + piece) * team.shape.top_k;
}

// ---- push ----

struct PushedPiece {
  Piece piece;
  uint64_t* arrival;
  int step;
};

// Of the pieces in the order of their rows.
__device__ __forceinline__ PushedPiece pushed_piece(const Team& team, const CombineArgs& args, int item) {
  const int row_bytes = team.shape.num_columns * 2, pieces = num_pieces(row_bytes), most = piece_bytes(row_bytes);
  const int row = __ldg(args.route.order + item / pieces), piece = item % pieces;
  const int origin = __ldg(args.route.origin + row);
  if (origin < 0) return {};
  const int top_k = team.shape.top_k, max_choices = team.shape.max_tokens * top_k, choice = origin % max_choices;
  char* window = team.peers[origin / max_choices];
  const int start = piece * most;
  char* slot = window + team.at.slots + int64_t(choice) * row_bytes;
  return {{slot + start, args.rows + int64_t(row) * row_bytes + start, min(most, row_bytes - start)},
          arrival_of(team, window, choice / top_k, piece) + choice % top_k,
          step_of(team, choice)};
}

// A block's part of a token, by its number among the block's.
struct SumItem {
  int token, part;
};

__device__ __forceinline__ SumItem sum_item(const Team& team, int index) {
  const int parts = ceil_div(team.shape.num_columns, kPartColumns), item = blockIdx.x + gridDim.x * index;
  return {item / parts, item % parts};
}

// The last step of which pieces may leave.
__device__ __forceinline__ int step_admitted(const Team& team, const SumArgs& args, const CombineStorage& storage) {
  const int token = sum_item(team, *const_cast<const volatile int*>(&storage.sums_begun)).token;
  return token < args.num_tokens ? step_of(team, token * team.shape.top_k) + kStepsAhead : INT_MAX;
}

__device__ inline void push_rows(const Team& team, const CombineArgs& args, CombineStorage& storage, uint64_t epoch) {
  const int num_rows = __ldg(args.route.offsets + team.shape.num_experts / team.shape.num_ranks);
  carry(
      storage.copiers, num_rows * num_pieces(team.shape.num_columns * 2),
      [&](int item) { return pushed_piece(team, args, item); },
      [&](const PushedPiece& pushed) { return pushed.step <= step_admitted(team, args.sum, storage); },
      [&](const PushedPiece& pushed) { store_release_system(pushed.arrival, epoch); });
}

// By one lane. This rank is not to blame for rows that its peers await: it has pushed all of its own, or it has itself
// waited for others for half the time after which a wait is in vain.
__device__ inline void tell_blameless(const Team& team, uint64_t epoch) {
  for (int peer = 0; peer < team.shape.num_ranks; ++peer) {
    store_release_system(signal_of(team, team.peers[peer], EpPhase::kPush, team.shape.rank), epoch);
  }
}

// By each copy warp once.
__device__ inline void tell_pushed(const Team& team, uint64_t epoch) {
  if (threadIdx.x % 32 != 0) return;
  unsigned* finished = &local_state(team).arrived[int(EpPhase::kPush)];
  if (atomicAdd(finished, 1u) != gridDim.x * kCopyWarps - 1) return;
  *finished = 0;
  tell_blameless(team, epoch);
}

// ---- sum ----

// By a warp: whether all peers push all of the epoch's rows.
__device__ inline bool all_push(const Team& team, uint64_t epoch) {
  bool fine = !has_failed(team);
  for (int peer = threadIdx.x % 32; peer < team.shape.num_ranks; peer += 32) {
    fine = fine && await_peer(team, EpPhase::kAnnounce, peer, epoch) && had_room(team, peer);
  }
  return __all_sync(0xffffffffu, fine);
}

// The wait for a slot was in vain: because of the first peer to blame, or of this rank if there is none.
__device__ inline void fail_slot(const Team& team, uint64_t epoch) {
  for (int peer = 0; peer < team.shape.num_ranks; ++peer) {
    const uint64_t seen = load_acquire_system(signal_of(team, team.self, EpPhase::kPush, peer));
    if (seen < epoch) return fail(team, {0, EpFault::kTimeout, EpPhase::kPush, peer, int64_t(epoch), int64_t(seen)});
  }
  fail(team, {0, EpFault::kTimeout, EpPhase::kPush, team.shape.rank, int64_t(epoch), 0});
}

// By a warp: whether a token's slots hold this piece of the epoch's rows.
__device__ inline bool await_slots(const Team& team, int token, int piece, uint64_t epoch) {
  const uint64_t* arrival = arrival_of(team, team.self, token, piece);
  uint64_t start = 0;  // read late: the clock is far away, and most slots are there
  bool fine = true, told = false;
  for (int k = threadIdx.x % 32; k < team.shape.top_k; k += 32) {
    while (fine && load_acquire_system(arrival + k) < epoch) {
      const uint64_t now = clock_ns();
      if (start == 0) start = now;
      if (!told && now - start > uint64_t(team.timeout_ns) / 2) tell_blameless(team, epoch), told = true;
      if (now - start > uint64_t(team.timeout_ns)) fail_slot(team, epoch);
      fine = !has_failed(team);
    }
  }
  fine = __all_sync(0xffffffffu, fine);
  __syncwarp();
  return fine;
}

// By a warp: parts that no other warp of the block has begun.
__device__ inline void sum_slots(const Team& team, const SumArgs& args, CombineStorage& storage, uint64_t epoch) {
  const bool complete = all_push(team, epoch);
  const auto* slots = in_window<const uint4>(team.self, team.at.slots);
  const int most = piece_bytes(team.shape.num_columns * 2);
  for (;;) {
    int index = 0;
    if (threadIdx.x % 32 == 0) index = atomicAdd(&storage.sums_begun, 1);
    const SumItem item = sum_item(team, __shfl_sync(0xffffffffu, index, 0));
    if (item.token >= args.num_tokens) return;
    if (complete && await_slots(team, item.token, item.part * kPartColumns * 2 / most, epoch)) {
      sum_part(team, args, slots, item.token, item.part);
    } else {
      spoil_part(team, args, item.token, item.part);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    ep_combine_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) char stages[];
  auto& storage = *reinterpret_cast<CombineStorage*>(stages);
  const uint64_t epoch = next_epoch(team, EpPhase::kReduce);
  if (threadIdx.x == 0) {
    start_copiers(storage.copiers);
    storage.sums_begun = 0;
  }
  const bool fine = await_peers(team, EpPhase::kReduce, epoch - 1);  // the slots have been read
  if (fine && blockIdx.x == 0 && int(threadIdx.x) < team.shape.num_ranks) {
    tell_overflow(team, args.route, threadIdx.x);
    store_release_system(signal_of(team, team.peers[threadIdx.x], EpPhase::kAnnounce, team.shape.rank), epoch);
  }
  if (fine && threadIdx.x / 32 < kCopyWarps) {
    if (__ldg(args.route.rows_needed) <= args.route.capacity) push_rows(team, args, storage, epoch);
    tell_pushed(team, epoch);
  }
  sum_slots(team, args.sum, storage, epoch);
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
