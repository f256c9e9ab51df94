// Shared memory of the decoding kernel over the FP8 cache: a ring of pages as they lie in memory, and what warps hand
// each other.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/ring.cuh"
#include "mla/decode_pieces.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kFp8Groups = 2;  // warpgroups that take pages in turns
constexpr int kFp8Stages = 4;
constexpr int kFp8Halves = 2;  // of a page: they come and go separately
constexpr int kFp8PageBytes = kPageTokens * kFp8TokenBytes;
constexpr int kFp8HalfBytes = kFp8PageBytes / kFp8Halves;
constexpr int kFp8Warps = 4;  // of a group, each with a tile of 128 columns
constexpr int kFp8Threads = (kFp8Groups + 1) * 32 * kFp8Warps;  // a warpgroup more, that loads
constexpr int kFp8Octets = kPageTokens / 8;                      // of a page's tokens
static_assert(kFp8Stages % kFp8Groups == 0);

struct DecodeFp8Storage {
  alignas(128) uint8_t page[kFp8Stages][kFp8PageBytes];
  float4 scores[kFp8Groups][kFp8Warps][kFp8Octets]
               [32];  // of a tile of columns, as lanes hold them; or half of an output
  float largest[kFp8Groups][kFp8Warps][kFp8Rows];        // magnitude of the queries
  float peak[kFp8Groups][kFp8Warps][kFp8Rows], sum[kFp8Groups][kFp8Warps][kFp8Rows];  // of a group's share of a piece
  float scale[kFp8Groups][kFp8Warps];  // of its output
  Barrier page_full[kFp8Stages][kFp8Halves], page_empty[kFp8Stages][kFp8Halves];
  Barrier piece_full[kTileSlots], piece_empty[kTileSlots];
  Piece piece[kTileSlots];
};

}  // namespace dsv3rt
