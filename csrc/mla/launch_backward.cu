#include "mla/backward_around.cuh"
#include "mla/launch.cuh"
#include "mla/sm90_mla_backward.cuh"

namespace dsv3rt {
namespace {

const char* encode_maps(const MlaBackwardParams& params, BackwardMaps& maps) {
  const int heads = params.num_heads, queries = params.num_queries, keys = params.num_keys;
  if (const char* error = encode_heads(maps.q, params.q, queries, heads, kQueryDim, kBackwardQueries)) return error;
  if (const char* error = encode_heads(maps.dout, params.dout, queries, heads, kValueDim, kBackwardQueries)) {
    return error;
  }
  if (const char* error = encode_heads(maps.k_nope, params.k_nope, keys, heads, kNopeDim, kBackwardKeys)) return error;
  if (const char* error = encode_heads(maps.k_rope, params.k_rope, keys, 1, kRopeDim, kBackwardKeys)) return error;
  return encode_heads(maps.v, params.v, keys, heads, kValueDim, kBackwardKeys);
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
  BackwardMaps maps{};
  if (const char* error = encode_maps(params, maps)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t rope_numbers = int64_t(params.num_keys) * kRopeDim;
  DSV3RT_CUDA_CHECK(cudaMemsetAsync(params.dk_rope_sum, 0, (rope_numbers + 1) * sizeof(float), cuda_stream));

  const dim3 tiles(params.num_tiles, params.num_heads);
  mla_backward_prepare_kernel<<<tiles, 256, 0, cuda_stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  constexpr int kSharedBytes = sizeof(BackwardStorage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  const auto kernel = sm90_mla_backward_kernel;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<num_sms, kBackwardThreads, kSharedBytes, cuda_stream>>>(maps, params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  mla_backward_finish_kernel<<<tiles, 256, 0, cuda_stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  mla_backward_rope_kernel<<<ceil_div(rope_numbers, int64_t(256 * 8)), 256, 0, cuda_stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
