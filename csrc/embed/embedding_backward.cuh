// The gradient of an embedding table. A block takes a row of the table and adds up the gradients of its tokens, in
// their order, in FP32; rows without a token become zero. So every row is written once, and by one block.
#pragma once

#include <cuda_bf16.h>

#include "embed/params.h"

namespace dsv3rt {

constexpr int kEmbeddingThreads = 512;
constexpr int kEmbeddingSteps = 4;  // gradients in flight a thread: the most frequent tokens set the pace

__device__ __forceinline__ void add_octet(float (&sums)[8], const uint4& octet) {
  const uint32_t words[4] = {octet.x, octet.y, octet.z, octet.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[2 * i] += __uint_as_float(words[i] << 16);
    sums[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 round_sums(const float (&sums)[8]) {
  uint4 words;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&words);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(sums[2 * i], sums[2 * i + 1]);
  return words;
}

__global__ void __launch_bounds__(kEmbeddingThreads) embedding_backward_kernel(const EmbeddingBackwardParams params) {
  const int64_t begin = params.offsets[blockIdx.x], end = params.offsets[blockIdx.x + 1];
  const int num_octets = params.num_columns / 8;
  auto* target = static_cast<uint4*>(params.weight_grad) + blockIdx.x * int64_t(num_octets);
  for (int octet = threadIdx.x; octet < num_octets; octet += kEmbeddingThreads) {
    const auto* grad = static_cast<const __nv_bfloat16*>(params.grad) + octet * 8;
    float sums[8] = {};
    for (int64_t first = begin; first < end; first += kEmbeddingSteps) {
      uint4 octets[kEmbeddingSteps];
#pragma unroll
      for (int i = 0; i < kEmbeddingSteps; ++i) {
        octets[i] = make_uint4(0, 0, 0, 0);
        if (first + i < end) {
          octets[i] = *reinterpret_cast<const uint4*>(grad + params.order[first + i] * params.grad_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kEmbeddingSteps; ++i) add_octet(sums, octets[i]);  // a zero changes no sum
    }
    target[octet] = round_sums(sums);
  }
}

}  // namespace dsv3rt
