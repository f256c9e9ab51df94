// grad_norms: the 2-norm of every tensor of a list, summed in FP64 and in one order.
#pragma once

#include "common/octet.cuh"
#include "optim/tensor_list.cuh"

namespace dsv3rt {

constexpr int kNormThreads = 256;
constexpr int kNormLoads = 4;  // octets a thread has under way

__device__ __forceinline__ double sum_over_block(double sum) {
  __shared__ double of_warp[kNormThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kNormThreads / 32; ++warp) total += of_warp[warp];
  return total;
}

// A thread's squares, in an order that does not depend on the alignment.
template <typename Element>
__device__ __forceinline__ double sum_of_squares(const Element* data, int64_t first, int64_t last) {
  double sum = 0.0;
  constexpr int kStride = kNormThreads * kOctet;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t start = first + threadIdx.x * kOctet; start < last; start += kNormLoads * kStride) {
    float x[kNormLoads][kOctet];
#pragma unroll
    for (int i = 0; i < kNormLoads; ++i) {
      const int64_t element = start + i * kStride;
      if (aligned && element + kOctet <= last) {
        load_octet(data + element, x[i]);
      } else {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) x[i][j] = element + j < last ? load_one(data + element + j) : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kNormLoads; ++i) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const double wide = x[i][j];
        sum += wide * wide;
      }
    }
  }
  return sum;
}

template <typename Element>
__global__ void __launch_bounds__(kNormThreads) sum_squares_kernel(const __grid_constant__ GradNormsParams params) {
  const int index = tensor_of_block(params.first_block, params.num_tensors);
  const NormTensor& tensor = params.tensors[index];
  const int64_t first = int64_t(blockIdx.x - params.first_block[index]) * kNormBlockElements;
  const int64_t last = min(first + kNormBlockElements, tensor.num_elements);
  const double sum = sum_over_block(sum_of_squares(static_cast<const Element*>(tensor.data), first, last));
  if (threadIdx.x == 0) params.partial[blockIdx.x] = sum;
}

// A block for each tensor.
__global__ void __launch_bounds__(kNormThreads) finish_norms_kernel(const __grid_constant__ GradNormsParams params) {
  double sum = 0.0;
  const int last = params.first_block[blockIdx.x + 1];
  for (int i = params.first_block[blockIdx.x] + threadIdx.x; i < last; i += kNormThreads) sum += params.partial[i];
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) params.norms[blockIdx.x] = sqrt(sum);
}

}  // namespace dsv3rt
