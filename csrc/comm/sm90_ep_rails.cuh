// Between nodes, along the rails: what a node mate cannot read or write itself, NCCL's one-sided puts carry to the rank
// of the same index in another node.
//
// A put has a fixed place at its target, so nobody negotiates. A phase ends with one strong signal in each context,
// which NCCL lets nobody see before the puts ahead of it; the signals count epochs. Their ranks tell node mates of them
// by the signals that those wait for anyway. Every wait ends: posts stay within NCCL's queues, since a block awaits
// that they are taken before it posts more.
#pragma once

#include "comm/nodes.cuh"
#include "comm/rails_nccl.h"

namespace dsv3rt {

constexpr int kRailThreads = 32;
// A block has at most twice as many puts to a peer under way. NCCL's proxy queues 256 for a peer and a context, which
// four blocks share, so none waits for room in the queue while it holds a place in it.
constexpr int kPutsUnderWay = 32;

__device__ __forceinline__ int num_contexts(const Rails& rails) {
  return min(int(rails.device.ginContextCount), kRailContexts);
}

__device__ __forceinline__ ncclGinSignal_t rail_signal(const NodesTeam& team, EpPhase phase, int sender_node) {
  return ncclGinSignal_t(int(phase) * team.nodes.count + sender_node);
}

__device__ __forceinline__ int rank_on_rail(const NodesTeam& team, int node) {
  return node * team.nodes.size + team.nodes.rail;
}

// One warp's way to put: a context, and space for the descriptors of its lanes.
struct Putter {
  const NodesTeam& team;
  const Rails& rails;
  ncclGinDescriptorSmem* descriptors;  // [32] in shared memory
  ncclGin gin;

  __device__ Putter(const NodesTeam& team, const Rails& rails, int context, ncclGinDescriptorSmem* descriptors)
      : team(team), rails(rails), descriptors(descriptors), gin(rails.device, context) {}

  __device__ ncclGin_DescriptorSmem descriptor() const { return {descriptors + threadIdx.x % 32}; }

  // By any lanes. Offsets are from the start of the windows.
  __device__ void put(int node, int64_t target, int64_t source, int64_t bytes) const {
    gin.put(ncclTeamRail(rails.device), node, rails.window, size_t(target), rails.window, size_t(source), size_t(bytes),
            ncclGin_None{}, ncclGin_None{}, ncclCoopThread{}, descriptor());
  }

  // By the whole warp: the sources of its puts may be written again.
  __device__ bool await_taken(EpPhase phase) const {
    const uint64_t cycles = 2 * uint64_t(team.timeout_ns);  // at 2 GHz; slower clocks wait longer
    const ncclResult_t result = gin.flush(ncclCoopWarp{}, cuda::memory_order_acquire, ncclGin_None{}, cycles);
    const bool taken = __all_sync(0xffffffffu, result == ncclSuccess);
    if (!taken && threadIdx.x % 32 == 0) fail(team, {0, EpFault::kNetwork, phase, team.shape.rank, 0, 0});
    return taken;
  }
};

// By the first warp of a kernel's last block: all nodes but this hear of it.
__device__ inline void tell_nodes(const NodesTeam& team, const Rails& rails, EpPhase phase,
                                  ncclGinDescriptorSmem* descriptors) {
  const int lane = threadIdx.x % 32, nodes = team.nodes.count;
  const ncclGin_StrongSignalInc told{rail_signal(team, phase, team.nodes.node)};
  for (int i = lane; i < nodes * num_contexts(rails); i += 32) {
    if (i % nodes == team.nodes.node) continue;
    const ncclGin gin(rails.device, i / nodes);
    gin.signal(ncclTeamRail(rails.device), i % nodes, told, ncclCoopThread{},
               ncclGin_DescriptorSmem{descriptors + lane});
  }
  __syncwarp();
}

// By one thread: whether `node` has told of `epoch`, in all contexts.
__device__ inline bool await_node(const NodesTeam& team, const Rails& rails, EpPhase phase, int node, uint64_t epoch) {
  const ncclGinSignal_t signal = rail_signal(team, phase, node);
  const uint64_t start = clock_ns();
  for (int context = 0; context < num_contexts(rails); ++context) {
    const ncclGin gin(rails.device, context);
    for (;;) {
      const uint64_t seen = gin.readSignal(signal);
      if (seen >= epoch) break;
      if (has_failed(team)) return false;
      if (clock_ns() - start > uint64_t(team.timeout_ns)) {
        fail(team, {0, EpFault::kTimeout, phase, rank_on_rail(team, node), int64_t(epoch), int64_t(seen)});
        return false;
      }
    }
  }
  return true;
}

// By a warp: the same of all nodes.
__device__ inline bool await_nodes(const NodesTeam& team, const Rails& rails, EpPhase phase, uint64_t epoch) {
  bool fine = !has_failed(team);
  for (int node = threadIdx.x % 32; node < team.nodes.count; node += 32) {
    if (node != team.nodes.node) fine = fine && await_node(team, rails, phase, node, epoch);
  }
  return __all_sync(0xffffffffu, fine);
}

// By a warp: awaits all nodes and passes the word on, by signals in windows, to this rank or to all of its node.
__device__ inline void relay(const NodesTeam& team, const Rails& rails, EpPhase phase, uint64_t epoch, bool to_mates) {
  for (int node = threadIdx.x % 32; node < team.nodes.count; node += 32) {
    if (node == team.nodes.node || !await_node(team, rails, phase, node, epoch)) continue;
    const int sender = rank_on_rail(team, node);
    for (int mate = 0; to_mates && mate < team.nodes.size; ++mate) {
      store_release_system(signal_of(team, team.peers[mate], phase, sender), epoch);
    }
    if (!to_mates) store_release_system(signal_of(team, team.self, phase, sender), epoch);
  }
  __syncwarp();
}

// ---- dispatch ----

// Marks, for every node, which choices of 32 tokens have their experts there.
__device__ inline void mark_leaving(const NodesTeam& team, const RailTokens& tokens, int group) {
  const int top_k = team.shape.top_k, num_choices = tokens.num_tokens * top_k, words = rail_words(team.shape);
  const uint32_t* choice = in_window<uint32_t>(team.self, team.at.choice);
  for (int word = group * top_k; word < (group + 1) * top_k; ++word) {
    const int entry = word * 32 + threadIdx.x % 32;
    const int node = node_of(team, entry < num_choices ? __ldcg(choice + entry) : kNoExpert);
    for (int n = 0; n < team.nodes.count; ++n) {
      const unsigned there = __ballot_sync(0xffffffffu, node == n);
      if (threadIdx.x % 32 == 0) tokens.words[n * words + word] = there;
    }
  }
  __syncwarp();
}

__device__ __forceinline__ bool has_expert_at(const NodesTeam& team, const RailTokens& tokens, int token, int node) {
  const uint32_t* words = tokens.words + node * rail_words(team.shape);
  bool any = false;
  for (int k = 0; k < team.shape.top_k; ++k) any |= is_marked(words, token * team.shape.top_k + k);
  return any;
}

// What `place` reads and what a weighted `pull` reads beside tokens: neighbours.
__device__ inline void put_choices(const Putter& putter, const RailTokens& tokens, int node) {
  const WindowLayout& at = putter.team.at;
  const int64_t inbox = inbox_of(putter.team, node, putter.team.nodes.node) - at.num_tokens;
  const int64_t start = tokens.finds_route ? at.num_tokens : at.weight;
  const int64_t end = at.weight + (tokens.weighted ? int64_t(tokens.num_tokens) * putter.team.shape.top_k * 4 : 0);
  if (end > start) putter.put(node, inbox + start, start, end - start);
}

// A token once to every other node that has an expert of it.
__device__ inline bool put_records(const Putter& putter, const RailTokens& tokens) {
  const NodesTeam& team = putter.team;
  const WindowLayout& at = team.at;
  for (int group = blockIdx.x; group * 32 < tokens.num_tokens; group += gridDim.x) {
    if (tokens.finds_route) mark_leaving(team, tokens, group);
    const int token = group * 32 + threadIdx.x % 32;
    const int64_t offset = at.tokens + int64_t(token) * tokens.record_bytes;
    for (int node = 0; token < tokens.num_tokens && node < team.nodes.count; ++node) {
      if (node == team.nodes.node || !has_expert_at(team, tokens, token, node)) continue;
      const int64_t inbox = inbox_of(team, node, team.nodes.node) - at.num_tokens;
      putter.put(node, inbox + offset, offset, tokens.record_bytes);
    }
    __syncwarp();
    if (!putter.await_taken(EpPhase::kStage)) return false;
  }
  return putter.await_taken(EpPhase::kStage);
}

__global__ void __launch_bounds__(kRailThreads, 1)
    ep_put_tokens_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ Rails rails,
                         const __grid_constant__ RailTokens tokens) {
  __shared__ ncclGinDescriptorSmem descriptors[kRailThreads];
  const uint64_t epoch = next_epoch(team, EpPhase::kStage) - 1;
  if (await_nodes(team, rails, EpPhase::kPull, epoch - 1)) {  // the inboxes have been read
    const Putter putter(team, rails, blockIdx.x % num_contexts(rails), descriptors);
    if (threadIdx.x == 0) {
      for (int node = blockIdx.x; node < team.nodes.count; node += gridDim.x) {
        if (node != team.nodes.node) put_choices(putter, tokens, node);
      }
    }
    __syncwarp();
    put_records(putter, tokens);
  }
  if (!is_last_block(team, EpPhase::kStage) || has_failed(team)) return;
  tell_nodes(team, rails, EpPhase::kStage, descriptors);
  relay(team, rails, EpPhase::kStage, epoch, true);
}

// Of one warp.
__global__ void __launch_bounds__(kRailThreads, 1)
    ep_release_inboxes_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ Rails rails,
                              bool weighted) {
  __shared__ ncclGinDescriptorSmem descriptors[kRailThreads];
  const uint64_t epoch = next_epoch(team, EpPhase::kPull) - 1;
  if (!await_mates(team, EpPhase::kPull, epoch)) return;
  const WindowLayout& at = team.at;
  if (weighted) {
    const Putter putter(team, rails, 0, descriptors);
    const int64_t bytes = int64_t(team.shape.max_tokens) * team.shape.top_k * 4;
    for (int node = threadIdx.x; node < team.nodes.count; node += kRailThreads) {
      if (node == team.nodes.node) continue;
      const int64_t inbox = inbox_of(team, team.nodes.node, node) - at.num_tokens;
      const int64_t target = team.rails.returned_weight_grad + area_of(node, team.nodes.node) * bytes;
      putter.put(node, target, inbox + at.weight_grad, bytes);
    }
    __syncwarp();
    if (!putter.await_taken(EpPhase::kPull)) return;
  }
  tell_nodes(team, rails, EpPhase::kPull, descriptors);
  if (weighted) relay(team, rails, EpPhase::kPull, epoch, false);
}

// ---- combine ----

// The rows of 32 choices of a rank on this rail.
__device__ __forceinline__ void put_rows(const Putter& putter, uint32_t marked, int node, int word) {
  const RailLayout& rails = putter.team.rails;
  const int64_t row_bytes = putter.team.shape.num_columns * 2;
  const int64_t row = (int64_t(word) * 32 + threadIdx.x % 32) * row_bytes;
  const int64_t outbox = rails.outbox + area_of(putter.team.nodes.node, node) * rails.outbox_bytes;
  if (marked >> (threadIdx.x % 32) & 1) putter.put(node, putter.team.at.slots + row, outbox + row, row_bytes);
  __syncwarp();
}

__device__ inline bool put_outbox(const Putter& putter, const uint32_t* words) {
  const Nodes& nodes = putter.team.nodes;
  const int num_words = rail_words(putter.team.shape);
  const uint32_t* returning = words + nodes.count * num_words;
  int under_way = 0;
  for (int i = blockIdx.x; i < nodes.count * num_words; i += gridDim.x) {
    const int node = i / num_words;
    const uint32_t marked = node != nodes.node ? __ldg(returning + i) : 0;
    if (marked == 0) continue;
    put_rows(putter, marked, node, i % num_words);
    under_way += __popc(marked);
    if (under_way < kPutsUnderWay) continue;
    if (!putter.await_taken(EpPhase::kPush)) return false;
    under_way = 0;
  }
  return putter.await_taken(EpPhase::kPush);
}

__global__ void __launch_bounds__(kRailThreads, 1)
    ep_put_slots_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ Rails rails,
                        const uint32_t* words) {
  __shared__ ncclGinDescriptorSmem descriptors[kRailThreads];
  const uint64_t epoch = next_epoch(team, EpPhase::kPush) - 1;
  const bool pushed = await_mates(team, EpPhase::kPush, epoch);
  if (pushed && await_nodes(team, rails, EpPhase::kReduce, epoch - 1)) {  // the slots there have been read
    const Putter putter(team, rails, blockIdx.x % num_contexts(rails), descriptors);
    const int64_t overflows = team.at.overflows + int64_t(16) * team.nodes.node * team.nodes.size;
    for (int node = threadIdx.x; blockIdx.x == 0 && node < team.nodes.count; node += kRailThreads) {
      if (node != team.nodes.node) putter.put(node, overflows, overflows, int64_t(16) * team.nodes.size);
    }
    __syncwarp();
    put_outbox(putter, words);
  }
  if (!is_last_block(team, EpPhase::kPush) || has_failed(team)) return;
  tell_nodes(team, rails, EpPhase::kPush, descriptors);
  relay(team, rails, EpPhase::kPush, epoch, false);
}

// Of one warp.
__global__ void __launch_bounds__(kRailThreads, 1)
    ep_release_slots_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ Rails rails) {
  __shared__ ncclGinDescriptorSmem descriptors[kRailThreads];
  if (!has_failed(team)) tell_nodes(team, rails, EpPhase::kReduce, descriptors);
}

// ---- the end ----

// Of one warp. Signals of the other phases were awaited when they were due.
__global__ void __launch_bounds__(kRailThreads, 1)
    ep_settle_rails_kernel(const __grid_constant__ NodesTeam team, const __grid_constant__ Rails rails) {
  __shared__ ncclGinDescriptorSmem descriptors[kRailThreads];
  for (int context = 0; context < num_contexts(rails); ++context) {
    if (!Putter(team, rails, context, descriptors).await_taken(EpPhase::kReduce)) return;
  }
  await_nodes(team, rails, EpPhase::kPull, next_epoch(team, EpPhase::kPull) - 1);
  await_nodes(team, rails, EpPhase::kReduce, next_epoch(team, EpPhase::kReduce) - 1);
}

}  // namespace dsv3rt
