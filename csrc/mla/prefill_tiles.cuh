// Which tiles a block computes: 128 queries of one head and sequence each. Blocks take them from one list in order, as
// they become free; inside a sequence the list runs from its last queries, which see most keys, to its first, over as
// many heads as have their keys and values in L2 together.
#pragma once

#include "common/math.h"
#include "mla/params.h"

namespace dsv3rt {

constexpr int kTileQueries = 128, kTileKeys = 128;
constexpr int64_t kL2KeyBytes = 32 << 20;

struct PrefillTile {
  int head;
  int query, query_end;  // rows of q: the first, and the end of the sequence
  int key;               // row of the sequence's first key
  int num_keys;          // of the sequence
  int seen;  // keys that the first query sees, each further one sees one more, up to num_keys; may be <= 0
  int num_blocks;  // of keys that any query of the tile sees; -1: no tile is left

  // Blocks that every query sees whole.
  __device__ __forceinline__ int num_whole_blocks() const { return max(min(num_keys, seen), 0) / kTileKeys; }
};

class PrefillScheduler {
 public:
  // Used by one whole warp.
  __device__ __forceinline__ explicit PrefillScheduler(const MlaPrefillParams& params)
      : params_(params), upcoming_(blockIdx.x) {
    enter_window(0, 0);
  }

  __device__ __forceinline__ PrefillTile next() {
    const int index = __shfl_sync(~0u, upcoming_, 0);
    if (lane() == 0) upcoming_ = gridDim.x + atomicAdd(params_.tile_counter, 1);  // one tile ahead, to hide its latency
    while (index >= window_end()) {
      if (window_ + 32 >= params_.num_sequences) return {0, 0, 0, 0, 0, 0, -1};
      enter_window(window_ + 32, window_end());
    }
    const uint32_t beyond = __ballot_sync(~0u, index < end_);
    const int owner = __ffs(beyond) - 1;
    const int first = owner == 0 ? window_begin_ : __shfl_sync(~0u, end_, max(owner - 1, 0));
    return place(window_ + owner, index - first);
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ int window_end() const { return __shfl_sync(~0u, end_, 31); }

  __device__ __forceinline__ int length_of(const int32_t* ends, int sequence) const {
    return max(ends[sequence + 1] - ends[sequence], 0);
  }

  // Looks at 32 sequences, whose tiles start at `begin`.
  __device__ __forceinline__ void enter_window(int window, int begin) {
    window_ = window;
    window_begin_ = begin;
    const int sequence = window + lane();
    end_ = 0;
    if (sequence < params_.num_sequences) {
      end_ = ceil_div(length_of(params_.q_ends, sequence), kTileQueries) * params_.num_heads;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, end_, distance);
      if (lane() >= distance) end_ += below;
    }
    end_ += begin;
  }

  __device__ __forceinline__ PrefillTile place(int sequence, int index) const {
    const int num_queries = length_of(params_.q_ends, sequence), num_keys = length_of(params_.k_ends, sequence);
    const int num_blocks = ceil_div(num_queries, kTileQueries);
    const int64_t head_bytes = int64_t(max(num_keys, 1)) * (kNopeDim + kValueDim) * 2;
    const int section = static_cast<int>(min(max(kL2KeyBytes / head_bytes, int64_t(1)), int64_t(params_.num_heads)));
    const int first_head = index / (section * num_blocks) * section;
    const int inside = index % (section * num_blocks), heads = min(section, params_.num_heads - first_head);
    const int first_query = (num_blocks - 1 - inside / heads) * kTileQueries;

    PrefillTile tile;
    tile.head = first_head + inside % heads;
    tile.query = params_.q_ends[sequence] + first_query;
    tile.query_end = min(params_.q_ends[sequence] + num_queries, params_.num_queries);
    tile.key = params_.k_ends[sequence];
    tile.num_keys = num_keys;
    tile.seen = params_.causal ? first_query + 1 + num_keys - num_queries : num_keys;
    const int last_seen = tile.seen + (params_.causal ? min(kTileQueries, num_queries - first_query) - 1 : 0);
    tile.num_blocks = ceil_div(max(min(num_keys, last_seen), 0), kTileKeys);
    return tile;
  }

  const MlaPrefillParams& params_;
  int upcoming_;  // lane 0: index of the next tile
  int window_, window_begin_;
  int end_;  // of the tiles of sequence window_ + lane
};

}  // namespace dsv3rt
