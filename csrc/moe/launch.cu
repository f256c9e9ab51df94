#include <algorithm>

#include "common/launch.h"
#include "moe/place.cuh"
#include "moe/route.cuh"
#include "moe/rows.cuh"

namespace dsv3rt {
namespace {

constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;

unsigned route_blocks(int64_t num_tokens) {
  return static_cast<unsigned>(std::min(ceil_div(num_tokens, int64_t(kRouteWarps)), int64_t(1) << 16));
}

}  // namespace

const char* route(const RouteParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto kernel = params.logits_bf16 ? route_kernel<__nv_bfloat16> : route_kernel<float>;
    kernel<<<route_blocks(params.num_tokens), kRouteWarps * 32, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

const char* route_backward(const RouteBackwardParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto kernel = params.logits_bf16 ? route_backward_kernel<__nv_bfloat16> : route_backward_kernel<float>;
    kernel<<<route_blocks(params.num_tokens), kRouteWarps * 32, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

const char* place(const PlaceParams& params, void* stream) {
  const int64_t blocks = ceil_div(params.num_choices, int64_t(kPlaceChoices));
  if (params.num_choices >= int64_t(1) << 30) return "idx has 2^30 choices or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto grid = static_cast<unsigned>(blocks);
    if (grid > 0) count_choices_kernel<<<grid, kPlaceChoices, 0, cuda_stream>>>(params);
    scan_choices_kernel<<<1, kMaxExperts, 0, cuda_stream>>>(params);
    if (grid > 0) assign_rows_kernel<<<grid, kPlaceChoices, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

const char* permute(const PermuteParams& params, void* stream) {
  const int64_t blocks = params.num_tokens + int64_t(params.num_experts) * kPaddingBlocks;
  if (blocks > kMaxBlocks) return "x has 2^31 rows or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    permute_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

const char* unpermute(const UnpermuteParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  if (params.num_tokens > kMaxBlocks) return "y has 2^31 rows or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto kernel = params.top_k == 8 ? unpermute_kernel<8> : unpermute_kernel<0>;
    kernel<<<static_cast<unsigned>(params.num_tokens), kRowThreads, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

const char* unpermute_backward(const UnpermuteBackwardParams& params, void* stream) {
  const int64_t blocks = params.num_tokens + int64_t(params.num_experts) * kPaddingBlocks;
  if (blocks > kMaxBlocks) return "y has 2^31 rows or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    unpermute_backward_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, cuda_stream>>>(params);
    return nullptr;
  });
}

}  // namespace dsv3rt
