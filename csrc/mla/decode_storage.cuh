// Shared memory of the decoding kernel: a ring of pages. A page is nine 64-column slabs of 128-byte rows in 128-byte
// swizzle: eight of the latent, which has three places, and one of rope keys, which has two. Queries of a piece pass
// through the ring as if they were a page, on their way to registers; what of them finds no room there stays in shared
// memory. Rope keys give way to the weights once the scores are known.
#pragma once

#include <cuda_bf16.h>

#include "hopper/barrier.cuh"
#include "hopper/ring.cuh"
#include "mla/decode_pieces.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kPageStages = 3, kRopeStages = 2;
constexpr int kLatentSlabs = kLatentDim / 64;
constexpr int kLatentChunks = 2;  // parts of a page's latent, each with a barrier of its own
constexpr int kChunkSlabs = kLatentSlabs / kLatentChunks;
constexpr int kQueryRegisterSteps = 27;  // of 16 columns; the rest of the queries, 9 steps, lies in shared memory
constexpr int kDecodeThreads = 512;  // warpgroups: loading, scores, two halves of the output
constexpr int kOutWarps = 8;

using PageSlab = __nv_bfloat16[kPageTokens * 64];
using PageRing = RingPosition<kPageStages>;

struct DecodeStorage {
  alignas(1024) PageSlab latent[kPageStages][kLatentSlabs];
  alignas(1024) PageSlab rope[kRopeStages];
  alignas(1024) PageSlab queries[2];         // columns 448 .. 512 and rope
  __nv_bfloat16 query_step[kDecodeRows * 16];  // columns 432 .. 448, rows of 32 bytes in 32-byte swizzle
  float rescale[kRopeStages][kDecodeRows];  // what sums over earlier pages must be multiplied by
  float inverse[kDecodeRows];               // of the sum of weights
  Barrier latent_full[kPageStages][kLatentChunks], rope_full[kRopeStages];
  Barrier page_empty[kPageStages];
  Barrier weights_full[kPageStages];
  Barrier inverse_full, inverse_empty;
  Barrier piece_full[kTileSlots], piece_empty[kTileSlots];
  Piece piece[kTileSlots];
};
static_assert(kLatentSlabs % kLatentChunks == 0 && kRopeStages == 2 && kTileSlots == 2);

}  // namespace dsv3rt
