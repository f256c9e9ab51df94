#include <algorithm>
#include <atomic>

#include "common/launch.h"
#include "quant/norm_backward.cuh"
#include "quant/norm_both.cuh"
#include "quant/quantize_1x128.cuh"

namespace dsv3rt {
namespace {

template <class Shape, typename Weight>
const char* launch_rows(const NormParams& params, cudaStream_t stream) {
  const unsigned blocks = ceil_div(params.out.num_rows, int64_t(kNormThreads / Shape::kThreads));
  norm_rows_kernel<Shape, Weight><<<blocks, kNormThreads, 0, stream>>>(params);
  return nullptr;
}

// How many clusters run at once, asked of each device once. `which` tells apart the shapes of one kernel.
template <typename Weight>
const char* clusters_at_once(const cudaLaunchConfig_t& config, int device, int which, int& count) {
  constexpr int kDevices = 64, kShapes = TileGroups::kMostGroups + 1;
  static std::atomic<int> known[kDevices][kShapes];
  if (device < kDevices && (count = known[device][which].load()) > 0) return nullptr;
  DSV3RT_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, norm_both_kernel<Weight>, &config));
  if (count == 0) return "no cluster of CTAs fits the device";
  if (device < kDevices) known[device][which].store(count);
  return nullptr;
}

template <typename Weight>
const char* launch_both(const NormParams& params, cudaStream_t stream) {
  const auto kernel = norm_both_kernel<Weight>;
  NormStrips strips{static_cast<int>(ceil_div(params.out.num_rows, int64_t(kTile))), 0,
                    TileGroups(params.out.num_columns)};
  DSV3RT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, NormStrips::kMostKeptBytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(strips.tiles.count), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(strips.tiles.count);
  config.blockDim = dim3(kTileThreads);
  config.dynamicSmemBytes = NormStrips::kMostKeptBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const char* error = clusters_at_once<Weight>(config, params.device, strips.tiles.count, strips.num_clusters);
  if (error != nullptr) return error;
  strips.num_clusters = std::min(strips.num_clusters, strips.num_strips);
  config.gridDim = dim3(strips.num_clusters * strips.tiles.count);
  DSV3RT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params, strips));
  return nullptr;
}

// Rows too wide for a cluster: the norm goes through memory.
template <class Shape, typename Weight>
const char* launch_both_through_memory(const NormParams& params, cudaStream_t stream) {
  NormParams norm = params;
  norm.out.data = nullptr;
  launch_rows<Shape, Weight>(norm, stream);
  const unsigned blocks = ceil_div(params.out.num_rows, int64_t(kTile)) * ceil_div(params.out.num_columns, kTile);
  using Source = PlainSource<__nv_bfloat16>;
  quantize_both_kernel<Source>
      <<<blocks, kTileThreads, 0, stream>>>({params.y, params.out.num_columns}, RowGroups{}, params.out);
  return nullptr;
}

// The same shape for the same width in every kernel: it fixes the order of the sums.
template <typename Weight>
const char* launch_norm(const NormParams& params, cudaStream_t stream) {
  const int columns = params.out.num_columns;
  const bool both = params.out.data_t != nullptr;
  if (both && columns <= kMaxNormBothColumns) return launch_both<Weight>(params, stream);
  const auto launch = [&]<class Shape>(Shape) {
    return both ? launch_both_through_memory<Shape, Weight>(params, stream)
                : launch_rows<Shape, Weight>(params, stream);
  };
  using Narrow = RowShape<32, 1>;
  using Latent = RowShape<32, 2>;
  using Hidden = RowShape<128, 2>;
  using Wide = RowShape<256, 2>;
  static_assert(Wide::kMaxColumns == kMaxNormColumns);
  return columns <= Narrow::kMaxColumns   ? launch(Narrow{})
         : columns <= Latent::kMaxColumns ? launch(Latent{})
         : columns <= Hidden::kMaxColumns ? launch(Hidden{})
                                          : launch(Wide{});
}

NormGroups groups_for(int columns) {
  NormGroups groups{};
  groups.threads = round_up(ceil_div(columns / 8, kNormOctets), 32);
  const int most = groups.threads == 32 ? kMaxNormGroups : 15;  // as many named barriers as there are for groups
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
