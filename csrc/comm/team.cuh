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

// Whom a wait in vain for `peer` is for: the mate that would have passed on its word, if that has not come so far
// itself.
__device__ inline int missing_rank(const Team& team, EpPhase phase, int peer, uint64_t epoch) {
  const int mate = team.nodes.node * team.nodes.size + peer % team.nodes.size;
  return load_acquire_system(signal_of(team, team.self, phase, mate)) < epoch ? mate : peer;
}

__device__ inline bool await_peer(const Team& team, EpPhase phase, int peer, uint64_t epoch) {
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

// Whether `ranks` have finished `epoch` of `phase`, as the whole block sees it; what they wrote before is visible then.
__device__ inline bool await_ranks(const Team& team, const Ranks& ranks, EpPhase phase, uint64_t epoch) {
  bool fine = !has_failed(team);
  for (int i = threadIdx.x; i < ranks.count; i += blockDim.x) {
    fine = fine && await_peer(team, phase, ranks.first + i * ranks.stride, epoch);
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

// For the last block alone. Tells the ranks of this node; others hear of it along the rails (sm90_ep_rails.cuh).
__device__ inline void tell_peers(const Team& team, EpPhase phase, uint64_t epoch) {
  __threadfence_system();
  __syncthreads();
  if (has_failed(team)) return;
  if (threadIdx.x == 0) local_state(team).epoch[int(phase)] = epoch;
  for (int peer = threadIdx.x; peer < team.nodes.size; peer += blockDim.x) {
    store_release_system(signal_of(team, team.peers[peer], phase, team.shape.rank), epoch);
  }
}

// ---- where another rank's data lie ----

// A pointer that stands for the window of `rank` where offsets of staged data are concerned: the window itself, or the
// inbox of the node mate that got a copy.
template <bool kNodes>
__device__ __forceinline__ char* staged_by(const Team& team, int rank) {
  if constexpr (kNodes) {
    const int node = rank / team.nodes.size;
    char* window = team.peers[rank % team.nodes.size];
    if (node == team.nodes.node) return window;
    return window + team.at.inbox - team.at.num_tokens + area_of(team.nodes.node, node) * team.at.staged_bytes;
  } else {
    return team.peers[rank];
  }
}

// Where rows for the tokens of `rank` go: its slots, or the outbox from which a node mate will send them on.
template <bool kNodes>
__device__ __forceinline__ char* slots_towards(const Team& team, int rank) {
  if constexpr (kNodes) {
    const int node = rank / team.nodes.size;
    char* window = team.peers[rank % team.nodes.size];
    if (node == team.nodes.node) return window + team.at.slots;
    return window + team.at.outbox + area_of(team.nodes.node, node) * team.at.slots_bytes;
  } else {
    return team.peers[rank] + team.at.slots;
  }
}

__device__ __forceinline__ bool is_marked(const uint32_t* words, int choice) {
  return words[choice / 32] >> (choice % 32) & 1;
}

// The node of a packed choice's expert; past all nodes where there is none.
__device__ __forceinline__ int node_of(const Team& team, uint32_t packed) {
  return int(packed >> 16) / (team.shape.num_experts / team.nodes.count);
}

// Bytes that a peer may have written: past the L1, which is not coherent.
__device__ __forceinline__ uint4 load_shared_memory(const uint4* pointer) { return __ldcg(pointer); }

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int warp_in_grid() { return blockIdx.x * kWarps + threadIdx.x / 32; }
__device__ __forceinline__ int warps_in_grid() { return gridDim.x * kWarps; }

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
