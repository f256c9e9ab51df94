// Rows between tokens and experts, 16 bytes a thread. A block takes a token and reads its row once; further blocks
// write zeros into the padding of segments. Rows named by nothing but padding are never read.
#pragma once

#include <cuda_bf16.h>

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
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kRowThreads) target[chunk] = make_uint4(0, 0, 0, 0);
  }
}

// The rows of a token's choices, once for the whole block.
__device__ __forceinline__ void load_choices(int64_t (&choices)[kMaxTopK], const int64_t* row_of, int64_t token,
                                             int top_k) {
  if (threadIdx.x < top_k) choices[threadIdx.x] = row_of[token * top_k + threadIdx.x];
  __syncthreads();
}

__global__ void __launch_bounds__(kRowThreads) permute_kernel(const __grid_constant__ PermuteParams params) {
  __shared__ int64_t choices[kMaxTopK];
  const int64_t token = blockIdx.x;
  if (token >= params.num_tokens) {
    const int index = static_cast<int>(token - params.num_tokens), expert = index / kPaddingBlocks;
    clear_padding(params.rows, params.row_bytes, params.num_rows, params.counts, params.offsets, index);
    if (params.scale == nullptr) return;
    const int64_t begin = params.offsets[expert] + params.counts[expert];
    const int64_t end = min(int64_t(params.offsets[expert + 1]), params.num_rows);
    for (int tile = index % kPaddingBlocks; tile < params.num_tiles; tile += kPaddingBlocks) {
      for (int64_t row = begin + threadIdx.x; row < end; row += kRowThreads) {
        params.rows_scale[tile * params.rows_scale_stride + row] = 0.0f;
      }
    }
    return;
  }
  load_choices(choices, params.row_of, token, params.top_k);
  const auto* source = reinterpret_cast<const uint4*>(static_cast<const char*>(params.x) + token * params.row_bytes);
  for (int chunk = threadIdx.x; chunk < params.row_bytes / 16; chunk += kRowThreads) {
    const uint4 words = source[chunk];
    for (int k = 0; k < params.top_k; ++k) {
      if (!is_row(choices[k], params.num_rows)) continue;
      reinterpret_cast<uint4*>(static_cast<char*>(params.rows) + choices[k] * params.row_bytes)[chunk] = words;
    }
  }
  if (params.scale == nullptr) return;
  for (int tile = threadIdx.x; tile < params.num_tiles; tile += kRowThreads) {
    const float scale = params.scale[tile * params.scale_stride + token];
    for (int k = 0; k < params.top_k; ++k) {
      if (is_row(choices[k], params.num_rows)) params.rows_scale[tile * params.rows_scale_stride + choices[k]] = scale;
    }
  }
}

__device__ __forceinline__ void unpack_octet(float (&values)[8], const uint4& words) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(pairs[i] << 16);
    values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 pack_octet(const float (&values)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    pairs[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// kTopK is 0 where it is not known to the compiler; else all rows of a chunk are loaded before the first is used.
template <int kTopK>
__global__ void __launch_bounds__(kRowThreads) unpermute_kernel(const __grid_constant__ UnpermuteParams params) {
  constexpr int kBatch = kTopK > 0 ? kTopK : 1;
  __shared__ int64_t choices[kMaxTopK];
  __shared__ float weights[kMaxTopK];
  const int64_t token = blockIdx.x;
  if (threadIdx.x < params.top_k) {
    weights[threadIdx.x] = params.weight == nullptr ? 1.0f : params.weight[token * params.top_k + threadIdx.x];
  }
  load_choices(choices, params.row_of, token, params.top_k);
  const int chunks = params.num_columns / 8;
  const auto* rows = static_cast<const uint4*>(params.rows);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kRowThreads) {
    float sum[8] = {};
    for (int first = 0; first < params.top_k; first += kBatch) {
      uint4 words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = choices[first + i];
        words[i] = is_row(row, params.num_rows) ? rows[row * chunks + chunk] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float values[8];
        unpack_octet(values, words[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = fmaf(weights[first + i], values[j], sum[j]);
      }
    }
    static_cast<uint4*>(params.y)[token * chunks + chunk] = pack_octet(sum);
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

// What row k of a token gets: weight * grad; and its part of that weight's gradient.
__device__ __forceinline__ float give_row(const UnpermuteBackwardParams& params, int64_t row, int chunk, float weight,
                                          const float (&grad)[8]) {
  const int chunks = params.num_columns / 8;
  float product[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) product[j] = weight * grad[j];
  static_cast<uint4*>(params.rows_grad)[row * chunks + chunk] = pack_octet(product);
  if (params.weight_grad == nullptr) return 0.0f;
  float values[8], dot = 0;
  unpack_octet(values, static_cast<const uint4*>(params.rows)[row * chunks + chunk]);
#pragma unroll
  for (int j = 0; j < 8; ++j) dot = fmaf(values[j], grad[j], dot);
  return dot;
}

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
  load_choices(choices, params.row_of, token, params.top_k);
  const int chunks = params.num_columns / 8;
  float dots[kMaxTopK] = {};
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kRowThreads) {
    float grad[8];
    unpack_octet(grad, static_cast<const uint4*>(params.grad)[token * chunks + chunk]);
#pragma unroll
    for (int k = 0; k < kMaxTopK; ++k) {
      if (k < params.top_k && is_row(choices[k], params.num_rows)) {
        dots[k] += give_row(params, choices[k], chunk, weights[k], grad);
      }
    }
  }
  if (params.weight_grad == nullptr) return;
  const float sum = sum_over_block(dots, params.top_k);
  if (threadIdx.x < params.top_k) params.weight_grad[token * params.top_k + threadIdx.x] = sum;
}

}  // namespace dsv3rt
