#include "mla/decode_combine.cuh"
#include "mla/launch.cuh"
#include "mla/sm90_mla_decode.cuh"
#include "mla/sm90_mla_decode_fp8.cuh"

namespace dsv3rt {
namespace {

const char* encode_rows(CUtensorMap& map, const void* base, int64_t rows) {
  return encode_map(map, MapSpec{base, kCachedDim, rows, kCachedDim * 2, 64, kPageTokens,
                                 CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_SWIZZLE_128B});
}

dim3 combine_grid(const MlaDecodeParams& params) {
  return dim3(ceil_div(params.num_queries * params.num_heads, kCombineRows), params.num_requests);
}

// Finds its parts while the last blocks of the kernel before, which wrote nothing that this needs, still run.
const char* combine_behind(const MlaDecodeParams& params, cudaStream_t stream) {
  DSV3RT_CUDA_CHECK(launch_early(mla_decode_combine_kernel, combine_grid(params), kCombineThreads, 0, stream, params));
  return nullptr;
}

bool has_pages(const MlaDecodeParams& params) { return params.num_pages > 0 && params.max_pages > 0; }

// Without pages there is nothing to attend to, and whatever is before in the stream may have written the lengths.
const char* combine_nothing(const MlaDecodeParams& params, cudaStream_t stream) {
  mla_decode_combine_kernel<<<combine_grid(params), kCombineThreads, 0, stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

template <class Cache>
const char* launch_rows(const MlaDecodeParams& params, cudaStream_t stream) {
  const int rows = params.num_queries * params.num_heads;
  DecodeMaps maps{};
  if (const char* error = encode_rows(maps.q, params.q, int64_t(params.num_requests) * rows)) return error;
  if constexpr (!Cache::Storage::kPagesByThreads) {
    const char* error = encode_rows(maps.cache, params.cache, int64_t(params.num_pages) * kPageTokens);
    if (error != nullptr) return error;
  }
  constexpr int kSharedBytes = sizeof(typename Cache::Storage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  const auto kernel = sm90_mla_decode_kernel<Cache>;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<dim3(params.grid.row_blocks, params.grid.parts), kDecodeThreads, kSharedBytes, stream>>>(maps, params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const char* launch_few_rows(const MlaDecodeParams& params, cudaStream_t stream) {
  constexpr int kSharedBytes = sizeof(DecodeFp8Storage);
  static_assert(kSharedBytes <= kMaxSharedBytes);
  const auto kernel = sm90_mla_decode_fp8_kernel;
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<dim3(params.grid.row_blocks, params.grid.parts), kFp8Threads, kSharedBytes, stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

bool writes_nothing(const MlaDecodeParams& params) {
  return params.num_requests == 0 || params.num_queries == 0 || params.num_heads == 0;
}

}  // namespace

const char* mla_decode(const MlaDecodeParams& params, void* stream) {
  if (writes_nothing(params)) return nullptr;
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (!has_pages(params)) return combine_nothing(params, cuda_stream);
  const auto launch = !params.fp8_cache                    ? launch_rows<Bf16Cache>
                      : params.grid.block_rows == kFp8Rows ? launch_few_rows
                                                           : launch_rows<Fp8Cache>;
  if (const char* error = launch(params, cuda_stream)) return error;
  return combine_behind(params, cuda_stream);
}

}  // namespace dsv3rt
