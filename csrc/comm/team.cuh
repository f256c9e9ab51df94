// Signals between ranks: epochs that only grow, and waits that end.
//
// A kernel awaits what it needs of its peers, works, and its last block tells the peers of its node. A wait that runs
// out writes the error record and marks the rank as failed; its blocks then go on without touching any data, and later
// kernels do nothing, so the process lives and peers run into their own timeouts. Rows that do not fit fail all ranks
// in the same `reduce`, so that none waits for one that has given up.
#pragma once

#include "comm/window.h"
#include "hopper/system.cuh"

namespace dsv3rt {

template <typename Value>
__device__ __forceinline__ Value* in_window(char* window, int64_t offset) {
  return reinterpret_cast<Value*>(window + offset);
}

__device__ __forceinline__ LocalState& local_state(const Team& team) {
  return *in_window<LocalState>(team.self, team.at.local);
}

__device__ __forceinline__ uint64_t* signal_of(const Team& team, char* window, EpPhase phase, int sender) {
  return in_window<uint64_t>(window, team.at.signals) + int(phase) * kMaxEpRanks + sender;
}

__device__ inline void report(const Team& team, const EpError& what) {
  if (atomicExch(&local_state(team).reported, 1u) != 0) return;
  EpError* record = team.error;
  record->fault = what.fault;
  record->phase = what.phase;
  record->peer = what.peer;
  record->expected = what.expected;
  record->seen = what.seen;
  __threadfence_system();
  record->is_complete = 1;
}

// After this the rank's kernels touch no data and tell peers nothing.
__device__ inline void fail(const Team& team, const EpError& what) {
  report(team, what);
  *reinterpret_cast<volatile unsigned*>(&local_state(team).failed) = 1;
}

// The epoch that the running kernel works on. Its last block writes the next one, after all blocks have read this.
__device__ __forceinline__ uint64_t next_epoch(const Team& team, EpPhase phase) {
  return *reinterpret_cast<volatile uint64_t*>(&local_state(team).epoch[int(phase)]) + 1;
}

__device__ __forceinline__ bool has_failed(const Team& team) {
  return *reinterpret_cast<volatile unsigned*>(&local_state(team).failed) != 0;
}

// Whom a wait in vain for `peer` is for.
__device__ __forceinline__ int missing_rank(const Team&, EpPhase, int peer, uint64_t) { return peer; }

template <typename AnyTeam>
__device__ inline bool await_peer(const AnyTeam& team, EpPhase phase, int peer, uint64_t epoch) {
  const uint64_t* signal = signal_of(team, team.self, phase, peer);
  const uint64_t start = clock_ns();
  for (;;) {
    const uint64_t seen = load_acquire_system(signal);
    if (seen >= epoch) return true;
    if (has_failed(team)) return false;
    if (clock_ns() - start > uint64_t(team.timeout_ns)) {
      const int missing = missing_rank(team, phase, peer, epoch);
      fail(team, {0, EpFault::kTimeout, phase, missing, int64_t(epoch), int64_t(seen)});
      return false;
    }
  }
}

// Whether all ranks have finished `epoch` of `phase`, as the whole block sees it; what they wrote before is visible
// then.
__device__ inline bool await_peers(const Team& team, EpPhase phase, uint64_t epoch) {
  bool fine = !has_failed(team);
  for (int peer = threadIdx.x; peer < team.shape.num_ranks; peer += blockDim.x) {
    fine = fine && await_peer(team, phase, peer, epoch);
  }
  return __syncthreads_and(fine);
}

// Whether this block is the last of the kernel to come here; what all blocks wrote before is visible to it then.
__device__ inline bool is_last_block(const Team& team, EpPhase phase) {
  __threadfence_system();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    unsigned* arrived = &local_state(team).arrived[int(phase)];
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;
    __threadfence_system();
  }
  return __syncthreads_or(last);
}

__device__ __forceinline__ int num_mates(const Team& team) { return team.shape.num_ranks; }

// For the last block alone. Tells the ranks of this node; others hear of it along the rails.
template <typename AnyTeam>
__device__ inline void tell_peers(const AnyTeam& team, EpPhase phase, uint64_t epoch) {
  __threadfence_system();
  __syncthreads();
  if (has_failed(team)) return;
  if (threadIdx.x == 0) local_state(team).epoch[int(phase)] = epoch;
  for (int peer = threadIdx.x; peer < num_mates(team); peer += blockDim.x) {
    store_release_system(signal_of(team, team.peers[peer], phase, team.shape.rank), epoch);
  }
}

// What differs between one node and several (nodes.cuh): whom to wait for, and where the data of a rank lie.
__device__ inline bool await_mates(const Team& team, EpPhase phase, uint64_t epoch) {
  return await_peers(team, phase, epoch);
}

__device__ inline bool await_mates_and_rails(const Team& team, EpPhase phase, uint64_t epoch) {
  return await_peers(team, phase, epoch);
}

__device__ __forceinline__ char* staged_by(const Team& team, int rank) { return team.peers[rank]; }

__device__ __forceinline__ char* slots_towards(const Team& team, int rank) { return team.peers[rank] + team.at.slots; }

// Bytes that a peer may have written: past the L1, which is not coherent.
__device__ __forceinline__ uint4 load_shared_memory(const uint4* pointer) { return __ldcg(pointer); }

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int warp_in_grid() { return blockIdx.x * kWarps + threadIdx.x / 32; }
__device__ __forceinline__ int warps_in_grid() { return gridDim.x * kWarps; }

// Gives each of `count` items to a warp. A warp looks 32 of its items up at once, a lane each, and then works on them
// one after the other, `turn` being the lane that has found one.
template <typename LookUp, typename Work>
__device__ __forceinline__ void in_turns(int count, LookUp look_up, Work work) {
  const int stride = warps_in_grid();
  for (int first = warp_in_grid(); first < count; first += 32 * stride) {
    const int mine = first + threadIdx.x % 32 * stride;
    const auto found = look_up(mine < count ? mine : -1);
    for (int turn = 0; turn < 32 && first + turn * stride < count; ++turn) work(first + turn * stride, found, turn);
  }
}

__device__ __forceinline__ char* address_of_lane(const char* address, int lane) {
  return reinterpret_cast<char*>(__shfl_sync(0xffffffffu, reinterpret_cast<uintptr_t>(address), lane));
}

// One warp copies a row; all loads of a turn are under way before its first store.
__device__ __forceinline__ void copy_row(uint4* target, const uint4* source, int num_vectors, int lane) {
  constexpr int kUnroll = 7;
  for (int start = lane; start < num_vectors; start += 32 * kUnroll) {
    uint4 held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (start + 32 * i < num_vectors) held[i] = load_shared_memory(source + start + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (start + 32 * i < num_vectors) target[start + 32 * i] = held[i];
    }
  }
}

}  // namespace dsv3rt
