#include "comm/rails.h"

#include <algorithm>

#include "comm/rails_nccl.h"

#if DSV3RT_HAS_RAILS
#include "comm/sm90_ep_rails.cuh"

namespace dsv3rt {

void put_tokens(const Rails& rails, const NodesTeam& team, const RailTokens& tokens, int num_sms, cudaStream_t stream) {
  ep_put_tokens_kernel<<<std::min(num_sms, kRailBlocks), kRailThreads, 0, stream>>>(team, rails, tokens);
}

void release_inboxes(const Rails& rails, const NodesTeam& team, bool weighted, cudaStream_t stream) {
  ep_release_inboxes_kernel<<<1, kRailThreads, 0, stream>>>(team, rails, weighted);
}

void put_slots(const Rails& rails, const NodesTeam& team, const uint32_t* words, int num_sms, cudaStream_t stream) {
  ep_put_slots_kernel<<<std::min(num_sms, kRailBlocks), kRailThreads, 0, stream>>>(team, rails, words);
}

void release_slots(const Rails& rails, const NodesTeam& team, cudaStream_t stream) {
  ep_release_slots_kernel<<<1, kRailThreads, 0, stream>>>(team, rails);
}

void settle_rails(const Rails& rails, const NodesTeam& team, cudaStream_t stream) {
  ep_settle_rails_kernel<<<1, kRailThreads, 0, stream>>>(team, rails);
}

}  // namespace dsv3rt

#else  // a group of several nodes cannot be created, so nobody comes here

namespace dsv3rt {

void put_tokens(const Rails&, const NodesTeam&, const RailTokens&, int, cudaStream_t) {}
void release_inboxes(const Rails&, const NodesTeam&, bool, cudaStream_t) {}
void put_slots(const Rails&, const NodesTeam&, const uint32_t*, int, cudaStream_t) {}
void release_slots(const Rails&, const NodesTeam&, cudaStream_t) {}
void settle_rails(const Rails&, const NodesTeam&, cudaStream_t) {}

}  // namespace dsv3rt

#endif
