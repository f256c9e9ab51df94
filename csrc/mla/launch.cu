#include "common/launch.h"
#include "common/tma_desc.h"
#include "mla/sm90_mla_prefill.cuh"

namespace dsv3rt {
namespace {

constexpr int kMaxSharedBytes = 232448;

const char* encode_maps(const MlaPrefillParams& params, PrefillMaps& maps) {
  const auto spec = [](const HeadsView& view, int64_t rows, int heads, int columns, int box_rows) {
    return SlabMapSpec{view.data, rows, heads, columns, view.row_stride, view.head_stride, box_rows};
  };
  const int heads = params.num_heads;
  if (const char* error = encode_map(maps.q, spec(params.q, params.num_queries, heads, kQueryDim, kTileQueries))) {
    return error;
  }
  if (params.num_keys == 0) return nullptr;  // nothing is loaded
  if (const char* error = encode_map(maps.k_nope, spec(params.k_nope, params.num_keys, heads, kNopeDim, kTileKeys))) {
    return error;
  }
  if (const char* error = encode_map(maps.k_rope, spec(params.k_rope, params.num_keys, 1, kRopeDim, kTileKeys))) {
    return error;
  }
  return encode_map(maps.v, spec(params.v, params.num_keys, heads, kValueDim, kTileKeys));
}

template <bool kPingPong>
const char* launch(const MlaPrefillParams& params, const PrefillMaps& maps, int num_sms, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(PrefillStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  const auto kernel = sm90_mla_prefill_kernel<kPingPong>;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  DSV3RT_CUDA_CHECK(cudaMemsetAsync(params.tile_counter, 0, sizeof(int32_t), stream));
  kernel<<<num_sms, kPrefillThreads, kSharedBytes, stream>>>(maps, params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace

const char* mla_prefill(const MlaPrefillParams& params, void* stream) {
  if (params.num_queries == 0 || params.num_heads == 0 || params.num_sequences == 0) return nullptr;
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  int num_sms = 0;
  DSV3RT_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, params.device));
  PrefillMaps maps{};
  if (const char* error = encode_maps(params, maps)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return params.ping_pong ? launch<true>(params, maps, num_sms, cuda_stream)
                          : launch<false>(params, maps, num_sms, cuda_stream);
}

}  // namespace dsv3rt
