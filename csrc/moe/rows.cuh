// What ways between tokens and experts share, and the gradient of the way back, 16 bytes a thread. A block takes a
// token and reads its row once; further blocks write zeros into the padding of segments. Rows named by nothing but
// padding are never read.
#pragma once

#include <cuda_bf16.h>

#include "common/bf16_pack.cuh"
#include "moe/params.h"

namespace dsv3rt {

constexpr int kRowThreads = 256;
constexpr int kPaddingBlocks = 8;  // a segment

__device__ __forceinline__ bool is_row(int64_t row, int64_t num_rows) { return row >= 0 && row < num_rows; }

// By block `index` of num_experts * kPaddingBlocks.
__device__ __forceinline__ void clear_padding(void* rows, int row_bytes, int64_t num_rows, const int32_t* counts,
                                              const int32_t* offsets, int index) {
  const int expert = index / kPaddingBlocks;
  const int64_t end = min(int64_t(offsets[expert + 1]), num_rows);
  const int chunks = row_bytes / 16;
  for (int64_t row = offsets[expert] + counts[expert] + index % kPaddingBlocks; row < end; row += kPaddingBlocks) {
    auto* target = reinterpret_cast<uint4*>(static_cast<char*>(rows) + row * row_bytes);
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kRowThreads) __stcs(target + chunk, make_uint4(0, 0, 0, 0));
  }
}

// The rows of a token's choices, once for the whole block, and whether all of them exist.
__device__ __forceinline__ bool load_choices(int64_t (&choices)[kMaxTopK], const int64_t* row_of, int64_t token,
                                             int top_k, int64_t num_rows) {
  bool exists = true;
  if (threadIdx.x < top_k) {
    choices[threadIdx.x] = row_of[token * top_k + threadIdx.x];
    exists = is_row(choices[threadIdx.x], num_rows);
  }
  return __syncthreads_and(exists);
}

__device__ __forceinline__ void unpack_octet(float (&values)[8], const uint4& words) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(pairs[i] << 16);
    values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

// Sums of the block's threads, in a fixed order; for thread k < count in its result.
__device__ __forceinline__ float sum_over_block(const float (&values)[kMaxTopK], int count) {
  __shared__ float parts[kRowThreads / 32][kMaxTopK];
#pragma unroll
  for (int k = 0; k < kMaxTopK; ++k) {
    float value = values[k];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][k] = value;
  }
  __syncthreads();
  float sum = 0;
  if (threadIdx.x < count) {
#pragma unroll
    for (int warp = 0; warp < kRowThreads / 32; ++warp) sum += parts[warp][threadIdx.x];
  }
  return sum;
}

// What a row gets, weight * grad; and its part of the weight's gradient.
__device__ __forceinline__ float give_row(uint4* target, const uint4& row, float weight, const float (&grad)[8]) {
  float product[8], values[8], dot = 0.0f;
  unpack_octet(values, row);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    product[j] = weight * grad[j];
    dot = fmaf(values[j], grad[j], dot);
  }
  *target = pack_bf16(product);
  return dot;
}

// kTopK: the choices of a token where the compiler knows them and all exist: the rows' loads then wait for nothing and
// for no other. 0: any number of choices, one at a time, those that do not exist left out. kWithRows: rows are read,
// for the gradient of the weights.
template <int kTopK, bool kWithRows>
__device__ __forceinline__ void give_rows(const UnpermuteBackwardParams& params, int64_t token,
                                          const int64_t (&choices)[kMaxTopK], const float (&weights)[kMaxTopK],
                                          float (&dots)[kMaxTopK]) {
  constexpr int kBatch = kTopK > 0 ? kTopK : 1, kMost = kTopK > 0 ? kTopK : kMaxTopK;
  const int chunks = params.num_columns / 8;
  const auto* rows = static_cast<const uint4*>(params.rows);
  auto* targets = static_cast<uint4*>(params.rows_grad);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kRowThreads) {
    float grad[8];
    unpack_octet(grad, static_cast<const uint4*>(params.grad)[token * chunks + chunk]);
#pragma unroll
    for (int first = 0; first < kMost; first += kBatch) {
      if (kTopK == 0 && (first >= params.top_k || !is_row(choices[first], params.num_rows))) continue;
      uint4 words[kBatch] = {};
      if (kWithRows) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) words[i] = rows[choices[first + i] * chunks + chunk];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        dots[first + i] += give_row(targets + choices[first + i] * chunks + chunk, words[i], weights[first + i], grad);
      }
    }
  }
}

template <int kTopK, bool kWithRows>
__global__ void __launch_bounds__(kRowThreads)
    unpermute_backward_kernel(const __grid_constant__ UnpermuteBackwardParams params) {
  __shared__ int64_t choices[kMaxTopK];
  __shared__ float weights[kMaxTopK];
  const int64_t token = blockIdx.x;
  if (token >= params.num_tokens) {
    clear_padding(params.rows_grad, params.num_columns * 2, params.num_rows, params.counts, params.offsets,
                  static_cast<int>(token - params.num_tokens));
    return;
  }
  if (threadIdx.x < params.top_k) {
    weights[threadIdx.x] = params.weight == nullptr ? 1.0f : params.weight[token * params.top_k + threadIdx.x];
  }
  float dots[kMaxTopK] = {};
  if (load_choices(choices, params.row_of, token, params.top_k, params.num_rows)) {
    give_rows<kTopK, kWithRows>(params, token, choices, weights, dots);
  } else {
    give_rows<0, kWithRows>(params, token, choices, weights, dots);
  }
  if (!kWithRows) return;
  const float sum = sum_over_block(dots, params.top_k);
  if (threadIdx.x < params.top_k) params.weight_grad[token * params.top_k + threadIdx.x] = sum;
}

}  // namespace dsv3rt
