// The gradient of an embedding table: every row of it is the sum of its tokens' gradients, in their order, in FP32,
// rounded once. Tokens that occur often have blocks of their own, which take some columns and have many gradients under
// way; the others, and zeros for rows without a token, are written row by row.
#pragma once

#include <cuda_bf16.h>

#include "common/bf16_pack.cuh"
#include "common/math.h"
#include "embed/params.h"

namespace dsv3rt {

constexpr int kEmbeddingThreads = 256;
constexpr int kLongRun = 16;  // tokens, and more
constexpr int kLongRunSteps = 12;  // gradients a thread has under way
constexpr int kTableRows = 4;  // of a block
constexpr int kOctetsAtOnce = 4;  // of a row, a thread

// How many blocks of each kind.
struct EmbeddingBlocks {
  int slices;  // of columns, of a long run
  int64_t long_runs, table;

  explicit EmbeddingBlocks(const EmbeddingBackwardParams& params)
      : slices(ceil_div(params.num_columns / 8, kEmbeddingThreads)),
        long_runs(ceil_div(params.num_tokens, int64_t(kLongRun)) * slices),
        table(ceil_div(params.num_rows, int64_t(kTableRows))) {}
};

__device__ __forceinline__ void add_octet(float (&sums)[8], const uint4& octet) {
  const uint32_t words[4] = {octet.x, octet.y, octet.z, octet.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[2 * i] += __uint_as_float(words[i] << 16);
    sums[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
  }
}

// Where the tokens of one row of the table lie in `order`.
struct Run {
  int64_t row;
  int begin, end;

  __device__ __forceinline__ Run(const EmbeddingBackwardParams& params, int64_t row)
      : row(row), begin(params.offsets[row]), end(params.offsets[row + 1]) {}
  __device__ __forceinline__ int length() const { return end - begin; }
};

__device__ __forceinline__ const uint4* gradient_of(const EmbeddingBackwardParams& params, int position) {
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(params.grad) +
                                        params.order[position] * params.grad_stride);
}

__device__ __forceinline__ uint4* row_of_table(const EmbeddingBackwardParams& params, int64_t row) {
  return static_cast<uint4*>(params.weight_grad) + row * (params.num_columns / 8);
}

// A long run holds a position that is a multiple of kLongRun; the first such one stands for it.
__device__ __forceinline__ void add_long_run(const EmbeddingBackwardParams& params, int64_t index, int slice) {
  const int position = static_cast<int>(index * kLongRun);
  const Run run(params, params.tokens[position]);
  if (run.length() < kLongRun || position - run.begin >= kLongRun) return;
  const int num_octets = params.num_columns / 8, octet = slice * kEmbeddingThreads + threadIdx.x;
  const auto* grad = static_cast<const __nv_bfloat16*>(params.grad) + min(octet, num_octets - 1) * 8;
  const int lane = threadIdx.x % 32;
  static_assert(kLongRunSteps <= 32);
  // Lane i knows where the i-th gradient of a step is. Past the end it is the last one again, which is not added.
  int64_t offset = params.order[min(run.begin + lane, run.end - 1)] * params.grad_stride;
  float sums[8] = {};
  for (int first = run.begin; first < run.end; first += kLongRunSteps) {
    const int64_t next = params.order[min(first + kLongRunSteps + lane, run.end - 1)] * params.grad_stride;
    uint4 octets[kLongRunSteps];
#pragma unroll
    for (int i = 0; i < kLongRunSteps; ++i) {
      octets[i] = *reinterpret_cast<const uint4*>(grad + __shfl_sync(~0u, offset, i));
    }
#pragma unroll
    for (int i = 0; i < kLongRunSteps; ++i) {
      if (first + i < run.end) add_octet(sums, octets[i]);
    }
    offset = next;
  }
  if (octet < num_octets) row_of_table(params, run.row)[octet] = pack_bf16(sums);
}

// A row of the table, but for a long run.
__device__ __forceinline__ void write_row(const EmbeddingBackwardParams& params, const Run& run) {
  if (run.length() >= kLongRun) return;
  const int num_octets = params.num_columns / 8;
  uint4* target = row_of_table(params, run.row);
  for (int first = threadIdx.x; first < num_octets; first += kEmbeddingThreads * kOctetsAtOnce) {
    float sums[kOctetsAtOnce][8] = {};
    for (int at = run.begin; at < run.end; ++at) {
      const uint4* gradient = gradient_of(params, at);
      uint4 octets[kOctetsAtOnce];
#pragma unroll
      for (int i = 0; i < kOctetsAtOnce; ++i) octets[i] = gradient[min(first + i * kEmbeddingThreads, num_octets - 1)];
#pragma unroll
      for (int i = 0; i < kOctetsAtOnce; ++i) add_octet(sums[i], octets[i]);
    }
#pragma unroll
    for (int i = 0; i < kOctetsAtOnce; ++i) {
      const int octet = first + i * kEmbeddingThreads;
      if (octet < num_octets) target[octet] = pack_bf16(sums[i]);
    }
  }
}

__global__ void __launch_bounds__(kEmbeddingThreads, 3)
    embedding_backward_kernel(const __grid_constant__ EmbeddingBackwardParams params,
                              const __grid_constant__ EmbeddingBlocks blocks) {
  if (blockIdx.x < blocks.long_runs) {
    return add_long_run(params, blockIdx.x / blocks.slices, static_cast<int>(blockIdx.x % blocks.slices));
  }
  const int64_t first = (blockIdx.x - blocks.long_runs) * kTableRows;
  for (int64_t row = first; row < min(first + kTableRows, params.num_rows); ++row) write_row(params, Run(params, row));
}

}  // namespace dsv3rt
