#include "common/launch.h"
#include "loss/sm90_softmax_loss.cuh"

namespace dsv3rt {
namespace {

template <int kOctets>
void launch(const SoftmaxLossParams& params, cudaStream_t stream) {
  softmax_loss_kernel<kOctets><<<unsigned(params.num_tokens * kRowBlocks), kLossThreads, 0, stream>>>(params);
}

}  // namespace

const char* softmax_loss(const SoftmaxLossParams& params, void* stream) {
  if (params.num_tokens == 0) return nullptr;
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  constexpr int kOctetLogits = kRowBlocks * kLossThreads * kOctet;  // what a cluster holds at an octet a thread
  static_assert(8 * kOctetLogits == kMaxVocab);
  if (params.vocab <= kOctetLogits) {
    launch<1>(params, cuda_stream);
  } else if (params.vocab <= 2 * kOctetLogits) {
    launch<2>(params, cuda_stream);
  } else if (params.vocab <= 4 * kOctetLogits) {
    launch<4>(params, cuda_stream);
  } else {
    launch<8>(params, cuda_stream);
  }
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
