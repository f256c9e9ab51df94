#include <algorithm>
#include <type_traits>

#include "common/clear.cuh"
#include "common/launch.h"
#include "moe/balance.cuh"
#include "moe/balance_backward.cuh"
#include "moe/permute.cuh"
#include "moe/place.cuh"
#include "moe/route.cuh"
#include "moe/route_backward.cuh"
#include "moe/rows.cuh"
#include "moe/sum.cuh"

namespace dsv3rt {
namespace {

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

unsigned token_blocks(int64_t num_tokens) { return static_cast<unsigned>(ceil_div(num_tokens, int64_t(kTokenWarps))); }

GroupShape group_shape(const RouteParams& params) {
  const int size = params.num_experts / params.num_groups;
  int shift = 0;
  while ((2 << shift) * params.num_groups <= 32) ++shift;
  return {size, shift};
}

ChoiceShape choice_shape(const RouteParams& params) {
  const bool grouped = params.groups_kept < params.num_groups;
  const int size = grouped ? params.num_experts / params.num_groups : params.num_experts;
  const int count = grouped ? size * params.groups_kept : size;
  return {grouped, size, static_cast<uint32_t>(count), ceil_div(1u << kGroupShift, static_cast<unsigned>(size))};
}

// Calls launch(std::integral_constant) with the experts that a lane holds, a power of two.
template <class Launch>
void with_experts_a_lane(int num_experts, Launch launch) {
  if (num_experts <= 32) return launch(std::integral_constant<int, 1>());
  if (num_experts <= 64) return launch(std::integral_constant<int, 2>());
  if (num_experts <= 128) return launch(std::integral_constant<int, 4>());
  if (num_experts <= 256) return launch(std::integral_constant<int, 8>());
  return launch(std::integral_constant<int, 16>());
}

// As above, with how many neighbours of them are an access (see expert_of).
template <class Launch>
void with_rows_of_experts(int num_experts, Launch launch) {
  with_experts_a_lane(num_experts, [&](auto per_lane) {
    if constexpr (per_lane.value >= 4) {
      if (num_experts % 4 == 0) return launch(per_lane, std::integral_constant<int, 4>());
    }
    launch(per_lane, std::integral_constant<int, 1>());
  });
}

template <typename Element, int kPerLane>
cudaError_t launch_route(const RouteParams& params, cudaStream_t stream) {
  const ChoiceShape choices = choice_shape(params);
  GroupShape groups = group_shape(params);
  constexpr int kFew = std::max(kPerLane / 2, 1);  // experts a lane that may be chosen
  const bool few = choices.count <= 32 * kFew;
  auto kernel = few ? route_kernel<Element, kPerLane, kFew, false> : route_kernel<Element, kPerLane, kPerLane, false>;
  if constexpr (kPerLane >= 4) {
    const int lanes = choices.size / kPerLane;
    if (choices.size % kPerLane == 0 && (!choices.grouped || (lanes & (lanes - 1)) == 0)) {
      kernel = few ? route_kernel<Element, kPerLane, kFew, true> : route_kernel<Element, kPerLane, kPerLane, true>;
      for (groups.lane_shift = 0; 1 << groups.lane_shift < lanes;) ++groups.lane_shift;
    }
  }
  const unsigned grid = std::min(token_blocks(params.num_tokens), kMaxRouteBlocks);
  return launch_early(kernel, grid, kTokenWarps * 32, 0, stream, params, groups, choices);
}

}  // namespace

const char* route(const RouteParams& params, void* stream) {
  if (params.num_tokens > kMaxBlocks) return "logits has 2^31 tokens or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    clear_kernel<<<1, kClearThreads, 0, cuda_stream>>>(params.counts, params.num_experts);
    if (params.num_tokens == 0) return nullptr;
    cudaError_t status = cudaSuccess;
    with_experts_a_lane(params.num_experts, [&](auto per_lane) {
      status = params.logits_bf16 ? launch_route<__nv_bfloat16, per_lane.value>(params, cuda_stream)
                                  : launch_route<float, per_lane.value>(params, cuda_stream);
    });
    DSV3RT_CUDA_CHECK(status);
    return nullptr;
  });
}

const char* route_backward(const RouteBackwardParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  if (params.num_tokens > kMaxBlocks) return "scores has 2^31 tokens or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    with_rows_of_experts(params.num_experts, [&](auto per_lane, auto width) {
      const auto kernel = params.logits_bf16 ? route_backward_kernel<__nv_bfloat16, per_lane.value, width.value>
                                             : route_backward_kernel<float, per_lane.value, width.value>;
      kernel<<<token_blocks(params.num_tokens), kTokenWarps * 32, 0, cuda_stream>>>(params);
    });
    return nullptr;
  });
}

const char* balance_loss(const BalanceParams& params, void* stream) {
  const int64_t blocks = int64_t(params.num_sequences) * params.num_parts;
  if (params.num_tokens > kMaxBlocks || blocks > kMaxBlocks) return "scores has 2^31 tokens or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    if (params.num_sequences == 0) {
      DSV3RT_CUDA_CHECK(cudaMemsetAsync(params.loss, 0, sizeof(float), cuda_stream));
      return nullptr;
    }
    clear_kernel<<<1, kClearThreads, 0, cuda_stream>>>(params.tickets, params.num_sequences + 1);
    cudaError_t status = cudaSuccess;
    with_rows_of_experts(params.num_experts, [&](auto per_lane, auto width) {
      const auto kernel = balance_kernel<per_lane.value, width.value>;
      constexpr int kSharedBytes = sizeof(BalanceSums<per_lane.value>);
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      if (status == cudaSuccess) {
        status =
            launch_early(kernel, static_cast<unsigned>(blocks), kBalanceThreads, kSharedBytes, cuda_stream, params);
      }
    });
    DSV3RT_CUDA_CHECK(status);
    return nullptr;
  });
}

const char* balance_loss_backward(const BalanceBackwardParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  if (params.num_tokens > kMaxBlocks) return "scores has 2^31 tokens or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    with_rows_of_experts(params.num_experts, [&](auto per_lane, auto width) {
      const unsigned grid = token_blocks(params.num_tokens);
      balance_backward_kernel<per_lane.value, width.value><<<grid, kTokenWarps * 32, 0, cuda_stream>>>(params);
    });
    return nullptr;
  });
}

const char* place(const PlaceParams& params, void* stream) {
  if (params.num_choices >= int64_t(1) << 30) return "idx has 2^30 choices or more";
  PlaceParams shared = params;
  const auto turns_of_all = static_cast<int>(ceil_div(params.num_choices, int64_t(kPlaceThreads)));
  shared.turns = ceil_div(turns_of_all, kMaxPlaceBlocks);
  shared.num_blocks = shared.turns == 0 ? 0 : ceil_div(turns_of_all, shared.turns);
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    if (shared.num_blocks > 0) count_choices_kernel<<<shared.num_blocks, kPlaceThreads, 0, cuda_stream>>>(shared);
    const unsigned blocks = std::max(shared.num_blocks, 1);  // one at least, for the offsets
    DSV3RT_CUDA_CHECK(launch_early(assign_rows_kernel, blocks, kPlaceThreads, 0, cuda_stream, shared));
    return nullptr;
  });
}

const char* permute(const PermuteParams& params, void* stream) {
  const PermuteBlocks blocks(params);
  const PrepareBlocks preparing(params);
  const int64_t prepare_grid = preparing.tokens + preparing.choices + params.num_experts;
  if (blocks.rows + blocks.scales > kMaxBlocks || prepare_grid > kMaxBlocks) return "x has 2^31 rows or more";
  const auto grid = static_cast<unsigned>(blocks.rows + blocks.scales);
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    if (params.scale == nullptr) {
      permute_kernel<<<grid, kRowThreads, 0, cuda_stream>>>(params, blocks);
      return nullptr;
    }
    prepare_scales_kernel<<<static_cast<unsigned>(prepare_grid), kRowThreads, 0, cuda_stream>>>(params, preparing);
    DSV3RT_CUDA_CHECK(launch_early(permute_kernel, grid, kRowThreads, 0, cuda_stream, params, blocks));
    return nullptr;
  });
}

const char* unpermute(const UnpermuteParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  const SumSpans spans(params);
  if (spans.all > kMaxBlocks) return "y has 2^31 spans of 256 columns or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto kernel = params.weight == nullptr ? unpermute_kernel<false> : unpermute_kernel<true>;
    const auto grid = static_cast<unsigned>(ceil_div(spans.all, int64_t(kSumWarps)));
    kernel<<<grid, 32 * kSumWarps, 0, cuda_stream>>>(params, spans);
    return nullptr;
  });
}

const char* unpermute_backward(const UnpermuteBackwardParams& params, void* stream) {
  const int64_t blocks = params.num_tokens + int64_t(params.num_experts) * kPaddingBlocks;
  if (blocks > kMaxBlocks) return "y has 2^31 rows or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto kernel = params.weight_grad == nullptr ? unpermute_backward_kernel<0, false>
                        : params.top_k == 8           ? unpermute_backward_kernel<8, true>
                        : params.top_k == 6           ? unpermute_backward_kernel<6, true>
                                                      : unpermute_backward_kernel<0, true>;
    kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

}  // namespace dsv3rt
