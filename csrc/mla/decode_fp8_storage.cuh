// Shared memory of the decoding kernel over the FP8 cache: pages as they lie in memory, and what warps hand each other.
// Two blocks share an SM.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/ring.cuh"
#include "mla/decode_pieces.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kFp8Blocks = 2;  // of an SM
constexpr int kFp8Stages = 2;
constexpr int kFp8PageBytes = kPageTokens * kFp8TokenBytes;
constexpr int kFp8Warps = 4;  // that multiply, each with a tile of 128 columns, and with 16 of a page's tokens
constexpr int kFp8Threads = 2 * 32 * kFp8Warps;  // a warpgroup more, that loads
constexpr int kFp8Octets = kPageTokens / 8;  // of a page's tokens

using Fp8Ring = RingPosition<kFp8Stages>;

struct DecodeFp8Storage {
  alignas(128) uint8_t page[kFp8Stages][kFp8PageBytes];
  float4 scores[kFp8Warps][kFp8Octets][32];  // of a tile of columns, as lanes hold them
  uint4 weights[kFp8Warps][32];  // of 16 tokens, as an operand
  float reference[kFp8Rows][kFp8Warps];  // what was subtracted from their scores
  float sum[kFp8Rows][kFp8Warps];  // of the weights of all such tokens
  float largest[kFp8Rows][kFp8Warps];  // magnitude of the queries, over a tile
  Barrier page_full[kFp8Stages], page_empty[kFp8Stages];
  Barrier piece_full[kTileSlots], piece_empty[kTileSlots];
  Piece piece[kTileSlots];
};

}  // namespace dsv3rt
