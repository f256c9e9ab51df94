// Rows from tokens to experts. A few threads of a multiprocessor keep the copy engine busy: a row arrives in shared
// memory once and leaves for each of its token's choices, a row of zeros for the padding of every segment. The other
// warps write the scales of FP8 rows, for neighbouring rows at a time.
#pragma once

#include "common/math.h"
#include "hopper/tma.cuh"
#include "moe/params.h"

namespace dsv3rt {

constexpr int kPermuteWarps = 8;
constexpr int kPieceBytes = 16384;     // of a row, at most, is under way at once
constexpr int kPermuteStages = 16;     // pieces in shared memory, at most
constexpr int kPermuteLag = 3;         // pieces whose stores may still read it
constexpr int kPermuteSharedBytes = 208 * 1024;
constexpr int kPaddingParts = 8;  // of a segment's padding
constexpr int kScalesInFlight = 8;

// Which token each row is, -1 in padding.
constexpr int kInvertThreads = 256;

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
  if (row >= 0 && row < params.num_rows) params.token_of_row[row] = static_cast<int32_t>(choice / params.top_k);
}

struct PermuteShape {
  int piece_bytes, pieces;  // of a row
  int stages;

  explicit PermuteShape(int row_bytes) : pieces(ceil_div(row_bytes, kPieceBytes)) {
    piece_bytes = round_up(ceil_div(row_bytes, pieces), 128);
    stages = kPermuteSharedBytes / piece_bytes - 1;
    if (stages > kPermuteStages) stages = kPermuteStages;
  }
  int shared_bytes() const { return (stages + 1) * piece_bytes; }  // the last is zero
};

class RowMover {
 public:
  __device__ __forceinline__ RowMover(const PermuteParams& params, const PermuteShape& shape, char* stages,
                                      Barrier* arrived)
      : params_(params), shape_(shape), stages_(stages), arrived_(arrived) {}

  // One warp calls it. Lane k sends rows to their k-th choice.
  __device__ __forceinline__ void move() const {
    const int lane = threadIdx.x % 32;
    const int64_t tokens = params_.num_tokens <= blockIdx.x ? 0 : (params_.num_tokens - 1 - blockIdx.x) / gridDim.x + 1;
    const int64_t items = tokens * shape_.pieces;
    if (lane == 0) {
      for (int item = 0; item < min(items, int64_t(shape_.stages)); ++item) fetch(item);
    }
    int64_t row = -1, next_row = row_of(0, lane);
    for (int64_t item = 0; item < items; ++item) {
      const int piece = static_cast<int>(item % shape_.pieces);
      if (piece == 0) {
        row = next_row;
        next_row = row_of(item / shape_.pieces + 1, lane);
      }
      const int stage = static_cast<int>(item % shape_.stages);
      arrived_[stage].wait(item / shape_.stages % 2);
      if (row >= 0 && row < params_.num_rows) {
        char* target = static_cast<char*>(params_.rows) + row * params_.row_bytes + piece * shape_.piece_bytes;
        bulk_store(target, stages_ + stage * shape_.piece_bytes, bytes_of(piece));
      }
      tma_store_commit();
      tma_store_wait_read<kPermuteLag>();
      __syncwarp();
      const int64_t done = item - kPermuteLag;
      if (lane == 0 && done >= 0 && done + shape_.stages < items) fetch(done + shape_.stages);
    }
    tma_store_wait_all();
  }

  // One warp calls it.
  __device__ __forceinline__ void clear_padding(const char* zeros) const {
    const int lane = threadIdx.x % 32;
    for (int index = blockIdx.x; index < params_.num_experts * kPaddingParts; index += gridDim.x) {
      const int expert = index / kPaddingParts, part = index % kPaddingParts;
      const int64_t end = min(int64_t(params_.offsets[expert + 1]), params_.num_rows);
      const int64_t begin = params_.offsets[expert] + params_.counts[expert];
      for (int64_t row = begin + part + lane * kPaddingParts; row < end; row += 32 * kPaddingParts) {
        for (int piece = 0; piece < shape_.pieces; ++piece) {
          char* target = static_cast<char*>(params_.rows) + row * params_.row_bytes + piece * shape_.piece_bytes;
          bulk_store(target, zeros, bytes_of(piece));
        }
      }
      tma_store_commit();
    }
    tma_store_wait_all();
  }

 private:
  __device__ __forceinline__ int bytes_of(int piece) const {
    return min(shape_.piece_bytes, params_.row_bytes - piece * shape_.piece_bytes);
  }
  __device__ __forceinline__ int64_t row_of(int64_t turn, int lane) const {
    const int64_t token = blockIdx.x + turn * gridDim.x;
    return token < params_.num_tokens && lane < params_.top_k ? params_.row_of[token * params_.top_k + lane] : -1;
  }
  __device__ __forceinline__ void fetch(int64_t item) const {
    const int64_t token = blockIdx.x + item / shape_.pieces * gridDim.x;
    const int piece = static_cast<int>(item % shape_.pieces), stage = static_cast<int>(item % shape_.stages);
    const char* source = static_cast<const char*>(params_.x) + token * params_.row_bytes + piece * shape_.piece_bytes;
    arrived_[stage].arrive_and_expect(bytes_of(piece));
    bulk_load(stages_ + stage * shape_.piece_bytes, source, bytes_of(piece), arrived_[stage]);
  }

  const PermuteParams& params_;
  const PermuteShape& shape_;
  char* stages_;
  Barrier* arrived_;
};

// By warp `worker` of `workers`: 32 neighbouring rows at a time.
__device__ __forceinline__ void move_scales(const PermuteParams& params, int worker, int workers) {
  const int64_t end = min(int64_t(params.offsets[params.num_experts]), params.num_rows);
  for (int64_t first = int64_t(worker) * 32; first < end; first += int64_t(workers) * 32) {
    const int64_t row = first + threadIdx.x % 32;
    if (row >= end) continue;
    const int64_t token = params.token_of_row[row];
    const bool exists = token >= 0 && token < params.num_tokens;
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
}

__global__ void __launch_bounds__(32 * kPermuteWarps)
    permute_kernel(const __grid_constant__ PermuteParams params, const __grid_constant__ PermuteShape shape) {
  extern __shared__ __align__(128) char permute_storage[];
  __shared__ Barrier arrived[kPermuteStages];
  const int warp = threadIdx.x / 32;
  char* zeros = permute_storage + shape.stages * shape.piece_bytes;
  const RowMover mover(params, shape, permute_storage, arrived);
  if (warp == 0) {
    if (threadIdx.x < shape.stages) arrived[threadIdx.x].init(1);
    fence_barrier_init();
    __syncwarp();
    mover.move();
  } else if (warp == 1) {
    for (int chunk = threadIdx.x % 32; chunk < shape.piece_bytes / 16; chunk += 32) {
      reinterpret_cast<uint4*>(zeros)[chunk] = make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
    __syncwarp();
    mover.clear_padding(zeros);
  } else if (params.scale != nullptr) {
    wait_for_prior_grid();
    move_scales(params, blockIdx.x * (kPermuteWarps - 2) + warp - 2, gridDim.x * (kPermuteWarps - 2));
  }
}

}  // namespace dsv3rt
