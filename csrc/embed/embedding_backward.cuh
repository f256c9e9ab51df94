// The gradient of an embedding table: every row of it is the sum of its tokens' gradients, in their order, in FP32,
// rounded once. Three kinds of blocks, by how much work a row is:
// - long runs, of tokens that occur often: a block takes some columns and has many gradients under way;
// - runs of few tokens: a warp takes a row;
// - rows without a token: the copy engine writes zeros, a row a thread. These blocks and those before alternate, so
// that
//   memory is never idle.
#pragma once

#include <cuda_bf16.h>

#include "common/math.h"
#include "embed/params.h"
#include "hopper/tma.cuh"

namespace dsv3rt {

constexpr int kEmbeddingThreads = 256;
constexpr int kLongRun = 16;        // tokens, and more
constexpr int kLongRunSteps = 12;   // gradients a thread has under way
constexpr int kShortRunOctets = 4;  // that a thread takes of a row at a time
constexpr int kShortRuns = kEmbeddingThreads / 32;  // positions of a block
constexpr int kEmptyRows = 64;        // of a block
constexpr int kZeroBytes = 16384;

// How many blocks of each kind.
struct EmbeddingBlocks {
  int slices;  // of columns, of a long run
  int64_t long_runs, short_runs, empty_rows;

  explicit EmbeddingBlocks(const EmbeddingBackwardParams& params)
      : slices(ceil_div(params.num_columns / 8, kEmbeddingThreads)),
        long_runs(ceil_div(params.num_tokens, int64_t(kLongRun)) * slices),
        short_runs(ceil_div(params.num_tokens, int64_t(kShortRuns))),
        empty_rows(ceil_div(params.num_rows, int64_t(kEmptyRows))) {}
  int64_t all() const { return long_runs + short_runs + empty_rows; }
};

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

// Where the tokens of one row of the table lie in `order`.
struct Run {
  int64_t row, begin, end;

  __device__ __forceinline__ Run(const EmbeddingBackwardParams& params, int64_t position) {
    row = params.tokens[position];
    begin = params.offsets[row];
    end = params.offsets[row + 1];
  }
  __device__ __forceinline__ int64_t length() const { return end - begin; }
};

__device__ __forceinline__ const uint4* gradient_of(const EmbeddingBackwardParams& params, int64_t position) {
  return reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(params.grad) +
                                        params.order[position] * params.grad_stride);
}

__device__ __forceinline__ uint4* row_of_table(const EmbeddingBackwardParams& params, int64_t row) {
  return static_cast<uint4*>(params.weight_grad) + row * (params.num_columns / 8);
}

// A long run holds a position that is a multiple of kLongRun; the first such one stands for it.
__device__ __forceinline__ void add_long_run(const EmbeddingBackwardParams& params, int64_t index, int slice) {
  const int64_t position = index * kLongRun;
  const Run run(params, position);
  if (run.length() < kLongRun || position - run.begin >= kLongRun) return;
  const int num_octets = params.num_columns / 8, octet = slice * kEmbeddingThreads + threadIdx.x;
  const auto* grad = static_cast<const __nv_bfloat16*>(params.grad) + min(octet, num_octets - 1) * 8;
  const int lane = threadIdx.x % 32;
  static_assert(kLongRunSteps <= 32);
  // Lane i knows where the i-th gradient of a step is. Past the end it is the last one again, which is not added.
  int64_t offset = params.order[min(run.begin + lane, run.end - 1)] * params.grad_stride;
  float sums[8] = {};
  for (int64_t first = run.begin; first < run.end; first += kLongRunSteps) {
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
  if (octet < num_octets) row_of_table(params, run.row)[octet] = round_sums(sums);
}

// By a warp.
__device__ __forceinline__ void add_short_run(const EmbeddingBackwardParams& params, int64_t position) {
  if (position >= params.num_tokens) return;
  const Run run(params, position);
  if (position != run.begin || run.length() >= kLongRun) return;
  const int num_octets = params.num_columns / 8;
  for (int first = threadIdx.x % 32; first < num_octets; first += 32 * kShortRunOctets) {
    float sums[kShortRunOctets][8] = {};
#pragma unroll 2
    for (int64_t at = run.begin; at < run.end; ++at) {
      const uint4* gradient = gradient_of(params, at);
      uint4 octets[kShortRunOctets];
#pragma unroll
      for (int i = 0; i < kShortRunOctets; ++i) octets[i] = gradient[min(first + i * 32, num_octets - 1)];
#pragma unroll
      for (int i = 0; i < kShortRunOctets; ++i) add_octet(sums[i], octets[i]);
    }
#pragma unroll
    for (int i = 0; i < kShortRunOctets; ++i) {
      if (first + i * 32 < num_octets) row_of_table(params, run.row)[first + i * 32] = round_sums(sums[i]);
    }
  }
}

__device__ __forceinline__ void clear_empty_rows(const EmbeddingBackwardParams& params, int64_t index, uint4* zeros) {
  for (int i = threadIdx.x; i < kZeroBytes / 16; i += kEmbeddingThreads) zeros[i] = make_uint4(0, 0, 0, 0);
  fence_async_proxy();
  __syncthreads();
  const int64_t row = index * kEmptyRows + threadIdx.x;
  if (threadIdx.x >= kEmptyRows || row >= params.num_rows || params.offsets[row] < params.offsets[row + 1]) return;
  char* target = reinterpret_cast<char*>(row_of_table(params, row));
  const int row_bytes = params.num_columns * 2;
  for (int done = 0; done < row_bytes; done += kZeroBytes) {
    bulk_store(target + done, zeros, min(kZeroBytes, row_bytes - done));
  }
  tma_store_commit();
  tma_store_wait_all();
}

__global__ void __launch_bounds__(kEmbeddingThreads, 3)
    embedding_backward_kernel(const __grid_constant__ EmbeddingBackwardParams params,
                              const __grid_constant__ EmbeddingBlocks blocks) {
  __shared__ alignas(128) uint4 zeros[kZeroBytes / 16];
  if (blockIdx.x < blocks.long_runs) {
    return add_long_run(params, blockIdx.x / blocks.slices, static_cast<int>(blockIdx.x % blocks.slices));
  }
  const int64_t index = blockIdx.x - blocks.long_runs, others = blocks.short_runs + blocks.empty_rows;
  const int64_t runs_before = index * blocks.short_runs / others;
  if ((index + 1) * blocks.short_runs / others > runs_before) {
    return add_short_run(params, runs_before * kShortRuns + threadIdx.x / 32);
  }
  clear_empty_rows(params, index - runs_before, zeros);
}

}  // namespace dsv3rt
