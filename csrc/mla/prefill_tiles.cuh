// Which tiles a block computes: 128 queries of one head and sequence each. Blocks take them from one list in order, as
// they become free; inside a sequence the list runs from its last queries, which see most keys, to its first, over as
// many heads as have their keys and values in L2 together.
#pragma once

#include "common/math.h"
#include "mla/params.h"
#include "mla/tile_cursor.cuh"

namespace dsv3rt {

constexpr int kTileQueries = 128, kTileKeys = 128;

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
      : params_(params),
        cursor_(params.q_ends, params.num_sequences, kTileQueries, params.num_heads),
        upcoming_(blockIdx.x) {}

  __device__ __forceinline__ PrefillTile next() {
    const int number = __shfl_sync(~0u, upcoming_, 0);
    if (threadIdx.x % 32 == 0) {  // one tile ahead, to hide its latency
      upcoming_ = gridDim.x + atomicAdd(params_.tile_counter, 1);
    }
    const TileCursor::Place found = cursor_.find(number);
    return found.sequence < 0 ? PrefillTile{0, 0, 0, 0, 0, 0, -1} : place(found.sequence, found.index);
  }

 private:
  __device__ __forceinline__ PrefillTile place(int sequence, int index) const {
    const int num_queries = length_of(params_.q_ends, sequence), num_keys = length_of(params_.k_ends, sequence);
    const int num_blocks = ceil_div(num_queries, kTileQueries);
    const int section = heads_in_l2(int64_t(max(num_keys, 1)) * (kNopeDim + kValueDim) * 2, params_.num_heads);
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
  TileCursor cursor_;
  int upcoming_;  // lane 0: number of the next tile
};

}  // namespace dsv3rt
