// Which tiles a block of the backward pass computes: 128 keys of one head and sequence each, against all queries that
// see any of them. Tiles are taken in order, as in the forward pass; inside a sequence from its first keys, which most
// queries see, to its last.
#pragma once

#include "mla/params.h"
#include "mla/tile_cursor.cuh"

namespace dsv3rt {

constexpr int kBackwardKeys = 128;

struct BackwardTile {
  int head;                       // -1: no tile is left
  int key, num_keys;              // row of the tile's first key; how many of its keys belong to the sequence
  int query, num_queries;         // row of the sequence's first query; of the sequence
  int seen;  // keys of the tile that the sequence's first query sees, may be <= 0; each further one
  int slope;  //   sees `slope` (0 or 1) more
  int query_tile;  // index of the sequence's first tile of queries
  int first_block, end_block;  // of 64 queries that see any key of the tile
  int num_masked;  // the first so many of them need a mask
};

// First tile of queries of a sequence: tiles of different sequences never overlap.
__device__ __forceinline__ int tile_of(int first_query, int sequence) {
  return first_query / kBackwardQueries + sequence;
}

__device__ __forceinline__ BackwardTile place_backward_tile(const MlaBackwardParams& params, TileCursor::Place found) {
  BackwardTile tile;
  tile.head = -1;
  if (found.sequence < 0) return tile;
  const int sequence = found.sequence;
  const int num_queries = length_of(params.q_ends, sequence), num_keys = length_of(params.k_ends, sequence);
  const int num_blocks = ceil_div(num_keys, kBackwardKeys);
  // Queries, their gradients, and FP32 sums of the latter.
  const int64_t head_bytes = int64_t(max(num_queries, 1)) * (kQueryDim * 2 + kValueDim * 2 + kQueryDim * 4);
  const int section = heads_in_l2(head_bytes, params.num_heads);
  const int first_head = found.index / (section * num_blocks) * section;
  const int inside = found.index % (section * num_blocks), heads = min(section, params.num_heads - first_head);
  const int first_key = inside / heads * kBackwardKeys;

  tile.head = first_head + inside % heads;
  tile.key = params.k_ends[sequence] + first_key;
  tile.num_keys = min(kBackwardKeys, num_keys - first_key);
  tile.query = params.q_ends[sequence];
  tile.num_queries = num_queries;
  tile.slope = params.causal;
  tile.seen = (params.causal ? 1 + num_keys - num_queries : num_keys) - first_key;
  tile.query_tile = tile_of(tile.query, sequence);
  tile.end_block = ceil_div(num_queries, kBackwardQueries);
  // Query i sees seen + i keys of the tile: the first that sees one, and the first that sees all.
  const int first_seeing = params.causal ? max(1 - tile.seen, 0) : 0;
  const int first_whole = params.causal ? max(tile.num_keys - tile.seen, 0) : 0;
  tile.first_block = min(first_seeing / kBackwardQueries, tile.end_block);
  const int masked_end = tile.num_keys < kBackwardKeys ? tile.end_block : ceil_div(first_whole, kBackwardQueries);
  tile.num_masked = min(max(masked_end, tile.first_block), tile.end_block) - tile.first_block;
  return tile;
}

}  // namespace dsv3rt
