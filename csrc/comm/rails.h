// What travels between nodes, along the rails: launches of the kernels that put through NCCL.
#pragma once

#include <cuda_runtime.h>

#include "comm/window.h"

namespace dsv3rt {

struct Rails;  // the device communicator and the window that it puts from and to

// The most blocks that put, and how many of NCCL's contexts they share.
constexpr int kRailBlocks = 16;
constexpr int kRailContexts = 4;
constexpr int kRailPhases = 4;  // stage, pull, push and reduce have signals between nodes

struct RailTokens {
  bool finds_route;
  bool weighted;
  int num_tokens;
  int record_bytes;
  uint32_t* words;  // the route's, see rail_words
};

// Between `stage` and `place`: staged tokens to the nodes of their experts, and word of those that have arrived here.
void put_tokens(const Rails& rails, const NodesTeam& team, const RailTokens& tokens, int num_sms, cudaStream_t stream);

// After `pull`: this node has read its inboxes. With weights, their gradients go back first, and those from other nodes
// are awaited.
void release_inboxes(const Rails& rails, const NodesTeam& team, bool weighted, cudaStream_t stream);

// Between `push` and `reduce`: rows from the outbox to the slots that they are for.
void put_slots(const Rails& rails, const NodesTeam& team, const uint32_t* words, int num_sms, cudaStream_t stream);

// After `reduce`: this rank's slots have been read.
void release_slots(const Rails& rails, const NodesTeam& team, cudaStream_t stream);

// Before the communicator goes: nothing is under way to this rank any more, nor from it.
void settle_rails(const Rails& rails, const NodesTeam& team, cudaStream_t stream);

}  // namespace dsv3rt
