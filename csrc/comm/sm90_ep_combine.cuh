// Combine within a node, one kernel: every warp pushes pieces of rows into the slots of their choices at the ranks that
// they came from, and sums slots of its own rank's tokens as it goes. Rows leave in the order of their tokens, and sums
// follow close behind, so slots are read while they are in the L2.
//
// A slot's piece is there once its flag holds the epoch. No wait is in a circle: a warp goes by steps, which number
// choices of all ranks; it awaits slots of a step only when it has pushed all that it has up to that step and kLag - 1
// beyond. Slots are written again after all of their rank's sums.
#pragma once

#include <climits>

#include "comm/sm90_ep_place.cuh"
#include "comm/sm90_ep_sum.cuh"

namespace dsv3rt {

struct CombineArgs {
  EpRoute route;
  const char* rows;  // (P, D) BF16
  SumArgs sum;
};

constexpr int kLag = 5;  // steps between what is pushed and what is summed

// A step's choices of each rank: as many as have their places in the order of rows together.
__device__ __forceinline__ int step_of(const Team& team, int choice) {
  return choice / (team.shape.num_ranks <= kTurns ? 32 : kChunk);
}

__device__ __forceinline__ uint64_t* arrival_of(const Team& team, char* window, int token, int piece) {
  const int pieces = num_pieces(team.shape.num_columns * 2);
  return in_window<uint64_t>(window, team.at.arrived) + (int64_t(token) * pieces + piece) * team.shape.top_k;
}

// ---- push ----

// A row in the order in which they leave; origin -1: there is none, nor any after it.
struct LeavingRow {
  int row, origin;
};

__device__ __forceinline__ LeavingRow leaving_row(const EpRoute& route, int index, int num_rows) {
  if (index >= num_rows) return {0, -1};
  const int row = __ldg(route.order + index);
  return {row, __ldg(route.origin + row)};
}

// By a warp. Returns where its flag is: the piece is there after a fence.
__device__ __forceinline__ uint64_t* push_piece(const Team& team, const CombineArgs& args, LeavingRow leaving,
                                                int piece) {
  const int top_k = team.shape.top_k, max_choices = team.shape.max_tokens * top_k;
  const int row_bytes = team.shape.num_columns * 2, most = piece_bytes(row_bytes), start = piece * most;
  const int choice = leaving.origin % max_choices;
  char* window = team.peers[leaving.origin / max_choices];
  char* slot = window + team.at.slots + int64_t(choice) * row_bytes + start;
  copy_row(reinterpret_cast<uint4*>(slot),
           reinterpret_cast<const uint4*>(args.rows + int64_t(leaving.row) * row_bytes + start),
           min(most, row_bytes - start) / 16, threadIdx.x % 32);
  return arrival_of(team, window, choice / top_k, piece) + choice % top_k;
}

// By one lane. This rank is not to blame for rows that its peers await: it has pushed all of its own, or it has itself
// waited for others for half the time after which a wait is in vain.
__device__ inline void tell_blameless(const Team& team, uint64_t epoch) {
  for (int peer = 0; peer < team.shape.num_ranks; ++peer) {
    store_release_system(signal_of(team, team.peers[peer], EpPhase::kPush, team.shape.rank), epoch);
  }
}

// By each warp once.
__device__ inline void tell_pushed(const Team& team, uint64_t epoch) {
  if (threadIdx.x % 32 != 0) return;
  unsigned* finished = &local_state(team).arrived[int(EpPhase::kPush)];
  if (atomicAdd(finished, 1u) != gridDim.x * kWarps - 1) return;
  *finished = 0;
  tell_blameless(team, epoch);
}

// ---- sum ----

// The wait for a slot was in vain: because of the first peer to blame, or of this rank if there is none.
__device__ inline void fail_slot(const Team& team, uint64_t epoch) {
  for (int peer = 0; peer < team.shape.num_ranks; ++peer) {
    const uint64_t seen = load_acquire_system(signal_of(team, team.self, EpPhase::kPush, peer));
    if (seen < epoch) return fail(team, {0, EpFault::kTimeout, EpPhase::kPush, peer, int64_t(epoch), int64_t(seen)});
  }
  fail(team, {0, EpFault::kTimeout, EpPhase::kPush, team.shape.rank, int64_t(epoch), 0});
}

// The parts of this rank's tokens that one warp sums, in the order of the tokens.
class Sums {
 public:
  __device__ Sums(const Team& team, const SumArgs& args, uint64_t epoch)
      : team_(team),
        args_(args),
        epoch_(epoch),
        parts_(ceil_div(team.shape.num_columns, kPartColumns)),
        item_(warp_in_grid()) {}

  __device__ __forceinline__ int step() const {
    if (item_ >= args_.num_tokens * parts_) return INT_MAX;
    return step_of(team_, (token() + 1) * team_.shape.top_k - 1);
  }

  // Whether the next part's slots seem to be there. They are, after a fence.
  __device__ __forceinline__ bool peek() const {
    if (item_ >= args_.num_tokens * parts_) return false;
    bool there = true;
    for (int k = threadIdx.x % 32; k < team_.shape.top_k; k += 32) {
      there = there && load_relaxed_system(arrival() + k) >= epoch_;
    }
    return __all_sync(0xffffffffu, there);
  }

  // By a warp: the next part, once its slots are there.
  __device__ __forceinline__ void next(bool there, bool complete) {
    if (complete && (there || await())) {
      sum_part(team_, args_, in_window<const uint4>(team_.self, team_.at.slots), token(), part());
    } else {
      spoil_part(team_, args_, token(), part());
    }
    item_ += warps_in_grid();
  }

 private:
  __device__ __forceinline__ int token() const { return item_ / parts_; }
  __device__ __forceinline__ int part() const { return item_ % parts_; }
  __device__ __forceinline__ const uint64_t* arrival() const {
    return arrival_of(team_, team_.self, token(), part() * kPartColumns * 2 / piece_bytes(team_.shape.num_columns * 2));
  }

  __device__ bool await() const {
    const uint64_t start = clock_ns();
    bool fine = true, told = false;
    for (int k = threadIdx.x % 32; k < team_.shape.top_k; k += 32) {
      while (fine && load_acquire_system(arrival() + k) < epoch_) {
        const uint64_t waited = clock_ns() - start;
        if (!told && waited > uint64_t(team_.timeout_ns) / 2) tell_blameless(team_, epoch_), told = true;
        if (waited > uint64_t(team_.timeout_ns)) fail_slot(team_, epoch_);
        fine = !has_failed(team_);
      }
    }
    fine = __all_sync(0xffffffffu, fine);
    __syncwarp();
    return fine;
  }

  const Team& team_;
  const SumArgs& args_;
  const uint64_t epoch_;
  const int parts_;
  int item_;
};

// ---- both ----

// Whether all peers push all of the epoch's rows.
__device__ inline bool all_push(const Team& team, uint64_t epoch) {
  bool fine = !has_failed(team);
  for (int peer = threadIdx.x; peer < team.shape.num_ranks; peer += kThreads) {
    fine = fine && await_peer(team, EpPhase::kAnnounce, peer, epoch) && had_room(team, peer);
  }
  return __syncthreads_and(fine);
}

__device__ inline void push_and_sum(const Team& team, const CombineArgs& args, Sums& sums, uint64_t epoch) {
  const int num_rows = __ldg(args.route.offsets + team.shape.num_experts / team.shape.num_ranks);
  const int pieces = num_pieces(team.shape.num_columns * 2);
  int item = warp_in_grid();
  LeavingRow next = leaving_row(args.route, item / pieces, num_rows);
  while (next.origin >= 0) {
    bool there = sums.peek();
    uint64_t* arrival = push_piece(team, args, next, item % pieces);
    item += warps_in_grid();
    next = leaving_row(args.route, item / pieces, num_rows);
    __syncwarp();
    fence_system();  // of the piece before its flag, and of flags seen before slots
    __syncwarp();
    if (threadIdx.x % 32 == 0) store_relaxed_system(arrival, epoch);
    if (next.origin < 0) break;
    const int step = step_of(team, next.origin % (team.shape.max_tokens * team.shape.top_k));
    for (; sums.step() <= step - kLag; there = false) sums.next(there, true);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    ep_combine_kernel(const __grid_constant__ Team team, const __grid_constant__ CombineArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kReduce);
  bool complete = await_peers(team, EpPhase::kReduce, epoch - 1);  // the slots have been read
  if (complete && blockIdx.x == 0 && int(threadIdx.x) < team.shape.num_ranks) {
    tell_overflow(team, args.route, threadIdx.x);
    store_release_system(signal_of(team, team.peers[threadIdx.x], EpPhase::kAnnounce, team.shape.rank), epoch);
  }
  complete = all_push(team, epoch);
  Sums sums(team, args.sum, epoch);
  if (complete) {
    push_and_sum(team, args, sums, epoch);
    tell_pushed(team, epoch);
  }
  while (sums.step() != INT_MAX) sums.next(false, complete);
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
