// Which tiles a block computes: 128 queries of one head and sequence each. Blocks take them from one list in order, as
// they become free; inside a sequence the list runs from its last queries, which see most keys, to its first, over as
// many heads as have their keys and values in L2 together.
#pragma once

#include "common/math.h"
#include "mla/params.h"
#include "mla/tile_cursor.cuh"

namespace dsv3rt {

constexpr int kTileQueries = 128;

// Keys come in blocks of `kBlockKeys`.
template <int kBlockKeys>
struct QueryTile {
  int head;
  int sequence;
  int query, query_end;  // rows of q: the first, and the end of the sequence
  int key;               // row of the sequence's first key
  int num_keys;          // of the sequence
  int seen;  // keys that the first query sees, each further one sees one more, up to num_keys; may be <= 0
  int num_blocks;  // of keys that any query of the tile sees; -1: no tile is left

  // Blocks that every query sees whole.
  __device__ __forceinline__ int num_whole_blocks() const { return max(min(num_keys, seen), 0) / kBlockKeys; }
};

// `Params`: those of the forward or the backward pass.
template <int kBlockKeys, class Params>
class QueryTileScheduler {
 public:
  // Used by one whole warp.
  __device__ __forceinline__ QueryTileScheduler(const Params& params, int32_t* counter)
      : params_(params), cursor_(params.q_ends, params.num_sequences, kTileQueries, params.num_heads), numbers_(counter) {}

  // `tile` may lie in shared memory: all lanes write the same.
  __device__ __forceinline__ void next(QueryTile<kBlockKeys>& tile) {
    const TileCursor::Place found = cursor_.find(numbers_.next());
    if (found.sequence < 0) {
      tile.num_blocks = -1;
    } else {
      place(tile, found.sequence, found.index);
    }
  }

 private:
  __device__ __forceinline__ void place(QueryTile<kBlockKeys>& tile, int sequence, int index) const {
    const int num_queries = length_of(params_.q_ends, sequence), num_keys = length_of(params_.k_ends, sequence);
    const int num_blocks = ceil_div(num_queries, kTileQueries);
    const int section = heads_in_l2<(kNopeDim + kValueDim) * 2>(num_keys, params_.num_heads);
    const int first_head = index / (section * num_blocks) * section;
    const int inside = index % (section * num_blocks), heads = min(section, params_.num_heads - first_head);
    const int first_query = (num_blocks - 1 - inside / heads) * kTileQueries;

    tile.head = first_head + inside % heads;
    tile.sequence = sequence;
    tile.query = params_.q_ends[sequence] + first_query;
    tile.query_end = min(params_.q_ends[sequence] + num_queries, params_.num_queries);
    tile.key = params_.k_ends[sequence];
    tile.num_keys = num_keys;
    const int seen = params_.causal ? first_query + 1 + num_keys - num_queries : num_keys;
    tile.seen = seen;
    const int last_seen = seen + (params_.causal ? min(kTileQueries, num_queries - first_query) - 1 : 0);
    tile.num_blocks = ceil_div(max(min(num_keys, last_seen), 0), kBlockKeys);
  }

  const Params& params_;
  TileCursor cursor_;
  TileNumbers numbers_;
};

}  // namespace dsv3rt
