// Rows from tokens to experts, 16 bytes a thread. A block takes a token and reads its row once, others write zeros into
// the padding of segments or, of FP8 rows, the scales of neighbouring rows. The kinds of blocks alternate.
#pragma once

#include "hopper/barrier.cuh"
#include "moe/rows.cuh"

namespace dsv3rt {

constexpr int kInvertThreads = 256;
constexpr int kChunksInFlight = 4;
constexpr int kScaleRows = kRowThreads;  // of a block: a warp takes 32
constexpr int kScalesInFlight = 8;

// For `permute_kernel`: which token each row is, -1 in padding.
__global__ void __launch_bounds__(kInvertThreads) invert_rows_kernel(const __grid_constant__ PermuteParams params) {
  let_next_grid_start();
  const int expert = static_cast<int>(blockIdx.x);
  if (expert < params.num_experts) {
    const int64_t end = min(int64_t(params.offsets[expert + 1]), params.num_rows);
    for (int64_t row = params.offsets[expert] + params.counts[expert] + threadIdx.x; row < end; row += kInvertThreads) {
      params.token_of_row[row] = -1;
    }
    return;
  }
  const int64_t choice = int64_t(expert - params.num_experts) * kInvertThreads + threadIdx.x;
  if (choice >= params.num_tokens * params.top_k) return;
  const int64_t row = params.row_of[choice];
  if (is_row(row, params.num_rows)) params.token_of_row[row] = static_cast<int32_t>(choice / params.top_k);
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
        if (first + i * kRowThreads < chunks) target[first + i * kRowThreads] = words[i];
      }
    }
  }
}

// Scales of 32 neighbouring rows a warp, column by column: written in whole sectors, read 4 bytes at a time, out of the
// L2.
__device__ __forceinline__ void move_scales(const PermuteParams& params, int64_t first_row) {
  const int64_t row = first_row + threadIdx.x;
  if (row >= min(int64_t(params.offsets[params.num_experts]), params.num_rows)) return;
  const int64_t token = params.token_of_row[row];
  const bool exists = is_row(token, params.num_tokens);
  const float* source = params.scale + (exists ? token : 0);
  float* target = params.rows_scale + row;
  for (int tile = 0; tile < params.num_tiles; tile += kScalesInFlight) {
    float scales[kScalesInFlight];
#pragma unroll
    for (int i = 0; i < kScalesInFlight; ++i) {
      scales[i] = exists && tile + i < params.num_tiles ? source[(tile + i) * params.scale_stride] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kScalesInFlight; ++i) {
      if (tile + i < params.num_tiles) target[(tile + i) * params.rows_scale_stride] = scales[i];
    }
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
  int64_t index = blockIdx.x;
  if (blocks.scales > 0) {
    const int64_t all = blocks.rows + blocks.scales, scales_before = index * blocks.scales / all;
    if ((index + 1) * blocks.scales / all > scales_before) {
      wait_for_prior_grid();
      return move_scales(params, scales_before * kScaleRows);
    }
    index -= scales_before;
  }
  if (index < params.num_tokens) return move_row(params, index);
  clear_padding(params.rows, params.row_bytes, params.num_rows, params.counts, params.offsets,
                static_cast<int>(index - params.num_tokens));
}

}  // namespace dsv3rt
