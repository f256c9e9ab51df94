#include "mla/backward_around.cuh"
#include "mla/launch.cuh"
#include "mla/sm90_mla_key_gradients.cuh"
#include "mla/sm90_mla_query_gradients.cuh"

namespace dsv3rt {
namespace {

// `query_rows`, `key_rows`: how many are loaded at a time.
template <class Maps>
const char* encode_maps(const MlaBackwardParams& params, int query_rows, int key_rows, Maps& maps) {
  const int heads = params.num_heads, queries = params.num_queries, keys = params.num_keys;
  if (const char* error = encode_heads(maps.q, params.q, queries, heads, kQueryDim, query_rows)) return error;
  if (const char* error = encode_heads(maps.dout, params.dout, queries, heads, kValueDim, query_rows)) return error;
  if (const char* error = encode_heads(maps.k_nope, params.k_nope, keys, heads, kNopeDim, key_rows)) return error;
  if (const char* error = encode_heads(maps.k_rope, params.k_rope, keys, 1, kRopeDim, key_rows)) return error;
  return encode_heads(maps.v, params.v, keys, heads, kValueDim, key_rows);
}

template <class Storage, class Maps>
const char* launch(void (*kernel)(Maps, MlaBackwardParams), const MlaBackwardParams& params, const Maps& maps,
                   int num_threads, int num_sms, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<num_sms, num_threads, kSharedBytes, stream>>>(maps, params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace

const char* mla_prefill_backward(const MlaBackwardParams& params, void* stream) {
  // Without a query or a key every gradient is empty or zero, which is left to the caller.
  if (params.num_queries == 0 || params.num_keys == 0 || params.num_heads == 0 || params.num_sequences == 0) {
    return nullptr;
  }
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  int num_sms = 0;
  DSV3RT_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, params.device));
  KeyGradientMaps key_maps{};
  if (const char* error = encode_maps(params, kBackwardQueries, kGradientKeys, key_maps)) return error;
  QueryGradientMaps query_maps{};
  if (const char* error = encode_maps(params, kTileQueries, kGradientBlockKeys, query_maps)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  DSV3RT_CUDA_CHECK(cudaMemsetAsync(params.tile_counters, 0, 2 * sizeof(int32_t), cuda_stream));

  mla_backward_prepare_kernel<<<dim3(params.num_tiles, params.num_heads), 256, 0, cuda_stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  if (const char* error = launch<KeyGradientStorage>(sm90_mla_key_gradients_kernel, params, key_maps,
                                                     kKeyGradientThreads, num_sms, cuda_stream)) {
    return error;
  }
  if (const char* error = launch<QueryGradientStorage>(sm90_mla_query_gradients_kernel, params, query_maps,
                                                       kQueryGradientThreads, num_sms, cuda_stream)) {
    return error;
  }
  const int64_t rope_numbers = int64_t(params.num_keys) * kRopeDim;
  mla_backward_rope_kernel<<<ceil_div(rope_numbers, int64_t(256 * 4)), 256, 0, cuda_stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
