// Small kernels that a group of several nodes has beside those for one.
#pragma once

#include "comm/nodes.cuh"

namespace dsv3rt {

// Marks the choices of this rank's rail that experts of this node serve: their rows go back through this rank.
__global__ void __launch_bounds__(kThreads)
    ep_mark_returning_kernel(const __grid_constant__ NodesTeam team, uint32_t* words) {
  if (!await_peers(team, EpPhase::kStage, next_epoch(team, EpPhase::kStage) - 1)) return;
  const int num_words = rail_words(team.shape), nodes = team.nodes.count;
  for (int i = warp_in_grid(); i < nodes * num_words; i += warps_in_grid()) {
    const int node = i / num_words;
    if (node == team.nodes.node) continue;
    char* window = staged_by(team, node * team.nodes.size + team.nodes.rail);
    const int num_choices = __ldcg(in_window<int>(window, team.at.num_tokens)) * team.shape.top_k;
    const int entry = i % num_words * 32 + threadIdx.x % 32;
    const uint32_t packed =
        entry < num_choices ? __ldcg(in_window<uint32_t>(window, team.at.choice) + entry) : kNoExpert;
    const unsigned here = __ballot_sync(0xffffffffu, node_of(team, packed) == team.nodes.node);
    if (threadIdx.x % 32 == 0) words[nodes * num_words + i] = here;
  }
}

// The weights' gradients that the experts' ranks left here, or that came along the rail from their node; NaN where some
// are missing.
__global__ void __launch_bounds__(kThreads)
    ep_rails_weight_grad_kernel(const __grid_constant__ NodesTeam team, float* weight_grad, const uint32_t* words,
                                int num_choices) {
  const bool fine = await_mates_and_rails(team, EpPhase::kPull, next_epoch(team, EpPhase::kPull) - 1);
  const int max_choices = team.shape.max_tokens * team.shape.top_k;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_choices; i += gridDim.x * kThreads) {
    const float* arrived = in_window<float>(team.self, team.at.weight_grad);
    for (int node = 0; node < team.nodes.count; ++node) {
      if (node == team.nodes.node || !is_marked(words + node * rail_words(team.shape), i)) continue;
      arrived = in_window<float>(team.self, team.rails.returned_weight_grad) +
                int64_t(area_of(team.nodes.node, node)) * max_choices;
    }
    weight_grad[i] = fine ? __ldcg(arrived + i) : __int_as_float(0x7fffffff);
  }
}

}  // namespace dsv3rt
