#include "common/launch.h"
#include "optim/adamw.cuh"
#include "optim/adamw_fp8.cuh"
#include "optim/grad_norms.cuh"

namespace dsv3rt {
namespace {

constexpr size_t kMostArguments = 32764;
static_assert(sizeof(AdamWParams) <= kMostArguments && sizeof(AdamWFp8Params) <= kMostArguments &&
              sizeof(GradNormsParams) <= kMostArguments);

template <typename Grad, typename Moment>
void launch_adamw(const AdamWParams& params, unsigned blocks, cudaStream_t stream) {
  if (params.param == OptimType::kFloat32) {
    adamw_kernel<Grad, Moment, float><<<blocks, kAdamWThreads, 0, stream>>>(params);
  } else {  // or none
    adamw_kernel<Grad, Moment, __nv_bfloat16><<<blocks, kAdamWThreads, 0, stream>>>(params);
  }
}

template <typename Grad>
void launch_adamw(const AdamWParams& params, unsigned blocks, cudaStream_t stream) {
  if (params.moment == OptimType::kBFloat16) {
    launch_adamw<Grad, __nv_bfloat16>(params, blocks, stream);
  } else {
    launch_adamw<Grad, float>(params, blocks, stream);
  }
}

template <typename Grad>
void launch_adamw_fp8(const AdamWFp8Params& params, unsigned blocks, cudaStream_t stream) {
  if (params.moment == OptimType::kBFloat16) {
    adamw_fp8_kernel<Grad, __nv_bfloat16><<<blocks, kTileThreads, 0, stream>>>(params);
  } else {
    adamw_fp8_kernel<Grad, float><<<blocks, kTileThreads, 0, stream>>>(params);
  }
}

}  // namespace

const char* adamw_step(AdamWParams& params, int device, void* stream) {
  const int64_t blocks = share_out(params.tensors, params.num_tensors, kAdamWBlockElements, params.first_block);
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the list has too many elements";
  const DeviceGuard guard(device);
  DSV3RT_CUDA_CHECK(guard.status());
  if (params.grad == OptimType::kBFloat16) {
    launch_adamw<__nv_bfloat16>(params, unsigned(blocks), static_cast<cudaStream_t>(stream));
  } else {
    launch_adamw<float>(params, unsigned(blocks), static_cast<cudaStream_t>(stream));
  }
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const char* adamw_step_fp8(AdamWFp8Params& params, int device, void* stream) {
  const int64_t blocks =
      share_out(params.tensors, params.num_tensors, params.first_block, [](const AdamWFp8Tensor& one) {
        return int64_t(one.num_matrices) * ceil_div(one.num_rows, kTile) * ceil_div(one.num_columns, kTile);
      });
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the list has too many elements";
  return on_device(device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    if (params.grad == OptimType::kBFloat16) {
      launch_adamw_fp8<__nv_bfloat16>(params, unsigned(blocks), cuda_stream);
    } else {
      launch_adamw_fp8<float>(params, unsigned(blocks), cuda_stream);
    }
    return nullptr;
  });
}

const char* grad_norms(GradNormsParams& params, int device, void* stream) {
  const int64_t blocks = share_out(params.tensors, params.num_tensors, kNormBlockElements, params.first_block);
  if (params.num_tensors == 0) return nullptr;
  if (blocks > INT32_MAX) return "the list has too many elements";
  const DeviceGuard guard(device);
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (blocks > 0 && params.type == OptimType::kBFloat16) {
    sum_squares_kernel<__nv_bfloat16><<<unsigned(blocks), kNormThreads, 0, cuda_stream>>>(params);
  } else if (blocks > 0) {
    sum_squares_kernel<float><<<unsigned(blocks), kNormThreads, 0, cuda_stream>>>(params);
  }
  finish_norms_kernel<<<params.num_tensors, kNormThreads, 0, cuda_stream>>>(params);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
