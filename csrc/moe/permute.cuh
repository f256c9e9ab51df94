// Rows from tokens to experts, 16 bytes a thread. A block takes a token and reads its row once, others write zeros into
// the padding of segments or, of FP8 rows, the scales of neighbouring rows. The kinds of blocks alternate. What is
// written is more than the L2 holds and marked as what leaves it first.
#pragma once

#include "hopper/barrier.cuh"
#include "moe/rows.cuh"

namespace dsv3rt {

constexpr int kChunksInFlight = 4;
constexpr int kScaleRows = 64, kScaleTiles = 64;  // of a block, at a time
using ScaleTile = float[kScaleRows][kScaleTiles + 1];

// How many blocks of each kind the kernel has that prepares scales.
struct PrepareBlocks {
  int64_t choices, tokens;  // besides those of experts

  explicit PrepareBlocks(const PermuteParams& params)
      : choices((params.num_tokens * params.top_k + kRowThreads - 1) / kRowThreads),
        tokens((params.num_tokens + kScaleRows - 1) / kScaleRows) {}
};

// The scales of 64 tokens side by side, from columns.
__device__ __forceinline__ void pack_scales(const PermuteParams& params, int64_t first_token, ScaleTile& tile) {
  const int tokens = static_cast<int>(min(params.num_tokens - first_token, int64_t(kScaleRows)));
  for (int first = 0; first < params.num_tiles; first += kScaleTiles) {
    const int tiles = min(params.num_tiles - first, kScaleTiles), token = threadIdx.x % kScaleRows;
    if (token < tokens) {
      for (int i = threadIdx.x / kScaleRows; i < tiles; i += kRowThreads / kScaleRows) {
        tile[token][i] = params.scale[(first + i) * params.scale_stride + first_token + token];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * tiles; i += kRowThreads) {
      params.packed_scale[(first_token + i / tiles) * params.num_tiles + first + i % tiles] =
          tile[i / tiles][i % tiles];
    }
    __syncthreads();
  }
}

// For the scales in `permute_kernel`: which token each row is, -1 in padding, and the scales of a token side by side.
__global__ void __launch_bounds__(kRowThreads)
    prepare_scales_kernel(const __grid_constant__ PermuteParams params, const __grid_constant__ PrepareBlocks blocks) {
  __shared__ ScaleTile tile;
  let_next_grid_start();
  int64_t index = blockIdx.x;
  if (index < blocks.tokens) return pack_scales(params, index * kScaleRows, tile);
  index -= blocks.tokens;
  if (index < blocks.choices) {
    const int64_t choice = index * kRowThreads + threadIdx.x;
    if (choice >= params.num_tokens * params.top_k) return;
    const int64_t row = params.row_of[choice];
    if (is_row(row, params.num_rows)) params.token_of_row[row] = static_cast<int32_t>(choice / params.top_k);
    return;
  }
  const int expert = static_cast<int>(index - blocks.choices);
  const int64_t end = min(int64_t(params.offsets[expert + 1]), params.num_rows);
  for (int64_t row = params.offsets[expert] + params.counts[expert] + threadIdx.x; row < end; row += kRowThreads) {
    params.token_of_row[row] = -1;
  }
}

__device__ __forceinline__ void move_row(const PermuteParams& params, int64_t token) {
  __shared__ int64_t choices[kMaxTopK];
  load_choices(choices, params.row_of, token, params.top_k, params.num_rows);
  const int chunks = params.row_bytes / 16;
  const auto* source = reinterpret_cast<const uint4*>(static_cast<const char*>(params.x) + token * params.row_bytes);
  for (int first = threadIdx.x; first < chunks; first += kRowThreads * kChunksInFlight) {
    uint4 words[kChunksInFlight];
#pragma unroll
    for (int i = 0; i < kChunksInFlight; ++i) {
      if (first + i * kRowThreads < chunks) words[i] = source[first + i * kRowThreads];
    }
    for (int k = 0; k < params.top_k; ++k) {
      if (!is_row(choices[k], params.num_rows)) continue;
      auto* target = reinterpret_cast<uint4*>(static_cast<char*>(params.rows) + choices[k] * params.row_bytes);
#pragma unroll
      for (int i = 0; i < kChunksInFlight; ++i) {
        if (first + i * kRowThreads < chunks) __stcs(target + first + i * kRowThreads, words[i]);
      }
    }
  }
}

// Scales of 64 neighbouring rows: read token by token, written column by column, whole sectors both times.
__device__ __forceinline__ void move_scales(const PermuteParams& params, int64_t first_row, ScaleTile& tile) {
  const int64_t end = min(int64_t(params.offsets[params.num_experts]), params.num_rows);
  const int rows = static_cast<int>(min(end - first_row, int64_t(kScaleRows)));
  if (rows <= 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int first = 0; first < params.num_tiles; first += kScaleTiles) {
    const int tiles = min(params.num_tiles - first, kScaleTiles);
#pragma unroll
    for (int i = 0; i < kScaleRows / (kRowThreads / 32); ++i) {
      const int row = i * (kRowThreads / 32) + warp;
      if (row >= rows) break;
      const int64_t token = params.token_of_row[first_row + row];
      const bool exists = is_row(token, params.num_tokens);
#pragma unroll
      for (int j = lane; j < kScaleTiles; j += 32) {
        if (j < tiles) tile[row][j] = exists ? params.packed_scale[token * params.num_tiles + first + j] : 0.0f;
      }
    }
    __syncthreads();
    const int row = threadIdx.x % kScaleRows;
    if (row < rows) {
      for (int i = threadIdx.x / kScaleRows; i < tiles; i += kRowThreads / kScaleRows) {
        params.rows_scale[(first + i) * params.rows_scale_stride + first_row + row] = tile[row][i];
      }
    }
    __syncthreads();
  }
}

// How many blocks of each kind.
struct PermuteBlocks {
  int64_t rows, scales;  // those of rows are tokens, then parts of padding

  explicit PermuteBlocks(const PermuteParams& params)
      : rows(params.num_tokens + int64_t(params.num_experts) * kPaddingBlocks),
        scales(params.scale == nullptr ? 0 : (params.num_rows + kScaleRows - 1) / kScaleRows) {}
};

__global__ void __launch_bounds__(kRowThreads)
    permute_kernel(const __grid_constant__ PermuteParams params, const __grid_constant__ PermuteBlocks blocks) {
  __shared__ ScaleTile tile;
  int64_t index = blockIdx.x;
  if (blocks.scales > 0) {
    const int64_t all = blocks.rows + blocks.scales, scales_before = index * blocks.scales / all;
    if ((index + 1) * blocks.scales / all > scales_before) {
      wait_for_prior_grid();
      return move_scales(params, scales_before * kScaleRows, tile);
    }
    index -= scales_before;
  }
  if (index < params.num_tokens) return move_row(params, index);
  clear_padding(params.rows, params.row_bytes, params.num_rows, params.counts, params.offsets,
                static_cast<int>(index - params.num_tokens));
}

}  // namespace dsv3rt
