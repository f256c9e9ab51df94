// The exchange's kernels in the order in which launch.cu launches them.
#pragma once

#include <cstring>
#include <type_traits>

#include "comm/sm90_ep_combine.cuh"
#include "comm/sm90_ep_dispatch.cuh"
#include "comm/sm90_ep_fetch.cuh"
#include "comm/sm90_ep_nodes.cuh"
#include "comm/sm90_ep_place.cuh"
#include "comm/sm90_ep_rails.cuh"

namespace dsv3rt {

constexpr int kBlocks = 2;

template <typename AnyTeam>
inline void dispatch_by(const AnyTeam& team, const Rails& rails, const EpDispatchParams& params) {
  constexpr bool kNodes = std::is_same_v<AnyTeam, NodesTeam>;
  const int record = round_up(params.tokens.row_bytes + 4 * params.tokens.num_scales, 16);
  const bool weighted = params.outputs != nullptr;
  const StageArgs stage{params.tokens, params.finds_route, params.choice, params.weight, params.num_tokens, record};
  host::launch(kBlocks, kThreads, [=, &team] { ep_stage_kernel(team, stage); });
  if constexpr (kNodes) {
    const RailTokens leaving{params.finds_route, weighted, params.num_tokens, record, params.rail_words};
    host::launch(kBlocks, kRailThreads, [=, &team, &rails] { ep_put_tokens_kernel(team, rails, leaving); });
    if (params.finds_route) {
      host::launch(kBlocks, kThreads, [=, &team] { ep_mark_returning_kernel(team, params.rail_words); });
    }
  }
  if (params.finds_route) {
    const PlaceArgs place{params.route, params.row_weight, params.place};
    host::launch(kBlocks, kThreads, [=, &team] { ep_place_kernel(team, place); });
  }
  const PullArgs pull{params.route, params.rows, static_cast<const __nv_bfloat16*>(params.outputs), record};
  host::launch(kBlocks, kThreads,
               [=, &team] { weighted ? ep_pull_kernel<true>(team, pull) : ep_pull_kernel<false>(team, pull); });
  if constexpr (kNodes) {
    host::launch(1, kRailThreads, [=, &team, &rails] { ep_release_inboxes_kernel(team, rails, weighted); });
  }
  if (!weighted) return;
  host::launch(1, kThreads, [=, &team] {
    const int num_choices = params.num_tokens * team.shape.top_k;
    if constexpr (kNodes) {
      ep_rails_weight_grad_kernel(team, params.weight_grad, params.rail_words, num_choices);
    } else {
      ep_weight_grad_kernel(team, params.weight_grad, num_choices);
    }
  });
}

template <typename AnyTeam>
inline void combine_by(const AnyTeam& team, const Rails& rails, const EpCombineParams& params) {
  constexpr bool kNodes = std::is_same_v<AnyTeam, NodesTeam>;
  const PushArgs push{params.route, static_cast<const char*>(params.rows)};
  const ReduceArgs reduce{params.weight, static_cast<__nv_bfloat16*>(params.tokens), params.num_tokens};
  host::launch(kBlocks, kThreads, [=, &team] { ep_push_kernel(team, push); });
  if constexpr (kNodes) {
    host::launch(kBlocks, kRailThreads, [=, &team, &rails] { ep_put_slots_kernel(team, rails, params.rail_words); });
  }
  host::launch(kBlocks, kThreads, [=, &team] { ep_reduce_kernel(team, reduce); });
  if constexpr (kNodes) host::launch(1, kRailThreads, [&team, &rails] { ep_release_slots_kernel(team, rails); });
}

inline void fetch_by(const Team& team, const EpCombineParams& params) {
  const FetchArgs fetch = fetch_args(team, params);
  if (params.row_weight_grad != nullptr) {
    std::memcpy(team.self + fetch.row_weight_grad, params.row_weight_grad, params.route.capacity * sizeof(float));
  }
  host::launch(kBlocks, kThreads, [=, &team] { ep_fetch_kernel(team, fetch); });
}

}  // namespace dsv3rt
