#include <algorithm>

#include "common/launch.h"
#include "quant/norm_backward.cuh"
#include "quant/norm_both.cuh"

namespace dsv3rt {
namespace {

template <class Shape, typename Weight>
const char* launch_rows(const NormParams& params, cudaStream_t stream) {
  const unsigned blocks = ceil_div(params.out.num_rows, int64_t(Shape::kRows));
  const bool casts_alone = Shape::kWhole && params.residual == nullptr && params.y == nullptr;
  const auto kernel =
      casts_alone ? norm_rows_kernel<Shape, Weight, Shape::kWhole> : norm_rows_kernel<Shape, Weight, false>;
  kernel<<<blocks, Shape::kBlockThreads, 0, stream>>>(params);
  return nullptr;
}

template <class Shape, typename Weight, bool kOfSum>
const char* launch_both(const NormParams& params, cudaStream_t stream) {
  constexpr int kBlocksAtOnce = 2 * 132;  // of an H100
  constexpr int kMostStages = 65535;      // rows of a grid
  using Roots = RootShape<Shape, kOfSum>;
  static_assert(kTile % Roots::kRows == 0);
  NormStages stages{};
  stages.row_blocks = kTile / Roots::kRows;
  const unsigned blocks = stages.row_blocks + ceil_div(params.out.num_columns, kTile);
  stages.lag = ceil_div(kBlocksAtOnce, static_cast<int>(blocks)) + 1;  // what is waited for is done, as a rule
  const int64_t num_strips = ceil_div(params.out.num_rows, int64_t(kTile));
  if (num_strips + stages.lag > kMostStages) return "x has 2^23 rows or more";
  stages.num_strips = static_cast<int>(num_strips);
  const unsigned forgetting = ceil_div(params.out.num_rows, int64_t(kForgetThreads));
  forget_roots_kernel<<<forgetting, kForgetThreads, 0, stream>>>(params);
  const dim3 grid(blocks, stages.num_strips + stages.lag);
  DSV3RT_CUDA_CHECK(
      launch_early(norm_both_kernel<Shape, Weight, kOfSum>, grid, kTileThreads, 0, stream, params, stages));
  return nullptr;
}

// The same number of threads a row for the same width in every kernel: it fixes the order of the sums.
template <typename Weight>
const char* launch_norm(const NormParams& params, cudaStream_t stream) {
  const int columns = params.out.num_columns;
  const auto launch = [&]<class Shape>(Shape) {
    using AnyWidth = RowShape<Shape::kThreads>;
    return params.out.data_t == nullptr ? launch_rows<Shape, Weight>(params, stream)
           : params.residual == nullptr ? launch_both<AnyWidth, Weight, false>(params, stream)
                                        : launch_both<AnyWidth, Weight, true>(params, stream);
  };
  using Narrow = RowShape<32>;
  using Latent = RowShape<64>;
  using Hidden = RowShape<224>;
  using WholeHidden = RowShape<224, true>;
  using Wide = RowShape<512>;
  static_assert(Wide::kMaxColumns == kMaxNormColumns);
  return columns <= Narrow::kMaxColumns   ? launch(Narrow{})
         : columns <= Latent::kMaxColumns ? launch(Latent{})
         : columns < Hidden::kMaxColumns  ? launch(Hidden{})
         : columns == Hidden::kMaxColumns ? launch(WholeHidden{})
                                          : launch(Wide{});
}

NormGroups groups_for(int columns) {
  NormGroups groups{};
  groups.threads = round_up(ceil_div(columns / 8, kNormOctets), 32);
  const int most = groups.threads == 32 ? kMaxNormGroups : kNamedBarriers - kNormGroupBarrier;
  groups.count = std::min(1024 / groups.threads, most);
  return groups;
}

template <typename Weight>
const char* launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream) {
  if (params.num_rows > 0) {
    const NormGroups groups = groups_for(params.num_columns);
    const auto kernel = norm_backward_kernel<Weight>;
    const int shared_bytes = groups.shared_bytes(params.grad_residual != nullptr);
    DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    kernel<<<params.num_parts, groups.block_threads(), shared_bytes, stream>>>(params, groups);
  }
  const unsigned blocks = ceil_div(params.num_columns, kPartColumns);
  DSV3RT_CUDA_CHECK(launch_early(add_weight_parts_kernel, blocks, kPartGroups * kPartColumnThreads, 0, stream, params));
  return nullptr;
}

}  // namespace

const char* rms_norm(const NormParams& params, void* stream) {
  if (params.out.num_rows == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) {
    return params.weight_type == QuantInput::kBFloat16 ? launch_norm<__nv_bfloat16>(params, cuda_stream)
                                                       : launch_norm<float>(params, cuda_stream);
  });
}

const char* rms_norm_backward(const NormBackwardParams& params, void* stream) {
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) {
    return params.weight_type == QuantInput::kBFloat16 ? launch_norm_backward<__nv_bfloat16>(params, cuda_stream)
                                                       : launch_norm_backward<float>(params, cuda_stream);
  });
}

}  // namespace dsv3rt
