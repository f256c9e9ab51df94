#include "mla/launch.cuh"
#include "mla/sm90_mla_prefill.cuh"

namespace dsv3rt {
namespace {

const char* encode_maps(const MlaPrefillParams& params, PrefillMaps& maps) {
  const int heads = params.num_heads, keys = params.num_keys;
  if (const char* error = encode_heads(maps.q, params.q, params.num_queries, heads, kQueryDim, kTileQueries)) {
    return error;
  }
  if (keys == 0) return nullptr;  // nothing is loaded
  if (const char* error = encode_heads(maps.k_nope, params.k_nope, keys, heads, kNopeDim, kTileKeys)) return error;
  if (const char* error = encode_heads(maps.k_rope, params.k_rope, keys, 1, kRopeDim, kTileKeys)) return error;
  return encode_heads(maps.v, params.v, keys, heads, kValueDim, kTileKeys);
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
  constexpr int kSharedBytes = sizeof(PrefillStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  const auto kernel = sm90_mla_prefill_kernel;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  DSV3RT_CUDA_CHECK(cudaMemsetAsync(params.tile_counter, 0, sizeof(int32_t), cuda_stream));
  kernel<<<num_sms, kPrefillThreads, kSharedBytes, cuda_stream>>>(maps, params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
