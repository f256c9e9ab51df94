// What kernels do otherwise in a group of several nodes: overloads of what team.cuh has for one.
//
// A rank has words of its own node's ranks, in the signals of its window, and words of others that came along a rail:
// put there by itself, or by the mate on the sender's rail (sm90_ep_rails.cuh).
#pragma once

#include "comm/team.cuh"

namespace dsv3rt {

// ---- waiting ----

// The mate that would have passed on the word of `peer`, if that mate has not come so far itself.
__device__ inline int missing_rank(const NodesTeam& team, EpPhase phase, int peer, uint64_t epoch) {
  const int mate = team.nodes.node * team.nodes.size + peer % team.nodes.size;
  return load_acquire_system(signal_of(team, team.self, phase, mate)) < epoch ? mate : peer;
}

__device__ inline bool await_ranks(const NodesTeam& team, const Ranks& ranks, EpPhase phase, uint64_t epoch) {
  bool fine = !has_failed(team);
  for (int i = threadIdx.x; i < ranks.count; i += blockDim.x) {
    fine = fine && await_peer(team, phase, ranks.first + i * ranks.stride, epoch);
  }
  return __syncthreads_and(fine);
}

__device__ inline bool await_peers(const NodesTeam& team, EpPhase phase, uint64_t epoch) {
  return await_ranks(team, everyone(team.nodes), phase, epoch);
}

__device__ inline bool await_mates(const NodesTeam& team, EpPhase phase, uint64_t epoch) {
  return await_ranks(team, node_mates(team.nodes), phase, epoch);
}

__device__ inline bool await_mates_and_rails(const NodesTeam& team, EpPhase phase, uint64_t epoch) {
  const bool fine = await_mates(team, phase, epoch);
  return await_ranks(team, rail_mates(team.nodes), phase, epoch) && fine;
}

__device__ __forceinline__ int num_mates(const NodesTeam& team) { return team.nodes.size; }

// ---- where another rank's data lie ----

__device__ __forceinline__ int64_t inbox_of(const NodesTeam& team, int owner_node, int sender_node) {
  return team.rails.inbox + area_of(owner_node, sender_node) * team.rails.inbox_bytes;
}

// A pointer that stands for the window of `rank` where offsets of staged data are concerned: the window itself, or the
// inbox of the mate that got a copy.
__device__ __forceinline__ char* staged_by(const NodesTeam& team, int rank) {
  const int node = rank / team.nodes.size;
  char* window = team.peers[rank % team.nodes.size];
  return node == team.nodes.node ? window : window + inbox_of(team, team.nodes.node, node) - team.at.num_tokens;
}

// Where rows for the tokens of `rank` go: its slots, or the outbox from which a mate will send them on.
__device__ __forceinline__ char* slots_towards(const NodesTeam& team, int rank) {
  const int node = rank / team.nodes.size;
  char* window = team.peers[rank % team.nodes.size];
  if (node == team.nodes.node) return window + team.at.slots;
  return window + team.rails.outbox + area_of(team.nodes.node, node) * team.rails.outbox_bytes;
}

// ---- a route's bits ----

__device__ __forceinline__ bool is_marked(const uint32_t* words, int choice) {
  return words[choice / 32] >> (choice % 32) & 1;
}

// The node of a packed choice's expert; past all nodes where there is none.
__device__ __forceinline__ int node_of(const NodesTeam& team, uint32_t packed) {
  return int(packed >> 16) / (team.shape.num_experts / team.nodes.count);
}

}  // namespace dsv3rt
