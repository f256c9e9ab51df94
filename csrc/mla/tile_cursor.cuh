// Finds the tile of a given number in the list of all sequences' tiles, by one whole warp. Numbers come in rising
// order.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace dsv3rt {

__device__ __forceinline__ int length_of(const int32_t* ends, int sequence) {
  return max(ends[sequence + 1] - ends[sequence], 0);
}

class TileCursor {
 public:
  struct Place {
    int sequence;  // -1: there is no such tile
    int index;     // among the sequence's tiles
  };

  // A sequence has `tiles_a_block` tiles for every `block_rows` of its rows. The search starts at sequence `window`, of
  // which the first tile has the number `window_begin`.
  __device__ __forceinline__ TileCursor(const int32_t* ends, int num_sequences, int block_rows, int tiles_a_block,
                                        int window = 0, int window_begin = 0)
      : ends_(ends), num_sequences_(num_sequences), block_rows_(block_rows), tiles_a_block_(tiles_a_block) {
    enter_window(window, window_begin);
  }

  __device__ __forceinline__ Place find(int number) {
    while (number >= window_end()) {
      if (window_ + 32 >= num_sequences_) return {-1, 0};
      enter_window(window_ + 32, window_end());
    }
    const int owner = __ffs(__ballot_sync(~0u, number < end_)) - 1;
    const int end_before = __shfl_sync(~0u, end_, max(owner - 1, 0));
    return {window_ + owner, number - (owner == 0 ? window_begin_ : end_before)};
  }

  __device__ __forceinline__ int window() const { return window_; }
  __device__ __forceinline__ int window_begin() const { return window_begin_; }

 private:
  __device__ __forceinline__ int window_end() const { return __shfl_sync(~0u, end_, 31); }

  // Looks at 32 sequences.
  __device__ __forceinline__ void enter_window(int window, int begin) {
    const int lane = threadIdx.x % 32, sequence = window + lane;
    window_ = window;
    window_begin_ = begin;
    end_ = sequence < num_sequences_ ? ceil_div(length_of(ends_, sequence), block_rows_) * tiles_a_block_ : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, end_, distance);
      if (lane >= distance) end_ += below;
    }
    end_ += begin;
  }

  const int32_t* ends_;
  int num_sequences_, block_rows_, tiles_a_block_;
  int window_, window_begin_;
  int end_;  // of the tiles of sequence window_ + lane
};

// Numbers of the tiles that a block takes: its own first, then whatever comes next. Used by one whole warp.
class TileNumbers {
 public:
  __device__ __forceinline__ explicit TileNumbers(int32_t* counter) : counter_(counter), upcoming_(blockIdx.x) {}

  __device__ __forceinline__ int next() {
    const int number = __shfl_sync(~0u, upcoming_, 0);
    if (threadIdx.x % 32 == 0) upcoming_ = gridDim.x + atomicAdd(counter_, 1);  // one tile ahead, to hide its latency
    return number;
  }

 private:
  int32_t* counter_;
  int upcoming_;  // lane 0: number of the next tile
};

// Heads of which `rows` rows of `kRowBytes` each fit in L2 together.
template <int kRowBytes>
__device__ __forceinline__ int heads_in_l2(int rows, int num_heads) {
  constexpr int kL2Rows = (32 << 20) / kRowBytes;
  return min(max(kL2Rows / max(rows, 1), 1), num_heads);
}

}  // namespace dsv3rt
