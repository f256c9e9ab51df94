#include "common/launch.h"
#include "common/math.h"
#include "mla/append_latents.cuh"

namespace dsv3rt {

const char* append_latents(const AppendParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  const auto kernel = params.fp8 ? append_latents_kernel<true> : append_latents_kernel<false>;
  const int blocks = ceil_div(params.num_tokens, kAppendWarps);
  kernel<<<blocks, 32 * kAppendWarps, 0, static_cast<cudaStream_t>(stream)>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
