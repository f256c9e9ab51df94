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
__device__ __forceinline__ void place_query_tile(QueryTile<kBlockKeys>& tile, const Params& params,
                                                 TileCursor::Place found) {
  tile.num_blocks = -1;
  if (found.sequence < 0) return;
  const int sequence = found.sequence, index = found.index;
  const int num_queries = length_of(params.q_ends, sequence), num_keys = length_of(params.k_ends, sequence);
  const int num_blocks = ceil_div(num_queries, kTileQueries);
  const int section = heads_in_l2<(kNopeDim + kValueDim) * 2>(num_keys, params.num_heads);
  const int first_head = index / (section * num_blocks) * section;
  const int inside = index % (section * num_blocks), heads = min(section, params.num_heads - first_head);
  const int first_query = (num_blocks - 1 - inside / heads) * kTileQueries;

  tile.head = first_head + inside % heads;
  tile.sequence = sequence;
  tile.query = params.q_ends[sequence] + first_query;
  tile.query_end = min(params.q_ends[sequence] + num_queries, params.num_queries);
  tile.key = params.k_ends[sequence];
  tile.num_keys = num_keys;
  const int seen = params.causal ? first_query + 1 + num_keys - num_queries : num_keys;
  tile.seen = seen;
  const int last_seen = seen + (params.causal ? min(kTileQueries, num_queries - first_query) - 1 : 0);
  tile.num_blocks = ceil_div(max(min(num_keys, last_seen), 0), kBlockKeys);
}

}  // namespace dsv3rt
