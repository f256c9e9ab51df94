// Shared memory of the decoding kernel over the FP8 cache. Pages lie as in memory; numbers go to registers from there.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/ring.cuh"
#include "mla/decode_pieces.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kFp8Stages = 5;
constexpr int kFp8PageBytes = kPageTokens * kFp8TokenBytes;
constexpr int kFp8Warps = 8;  // that multiply; one more loads
constexpr int kFp8Threads = 32 * (kFp8Warps + 1);
constexpr int kFp8Halves = 2;                   // of the columns of a score, summed by different warps
constexpr int kScoreStride = kPageTokens + 4;   // of rows, to spread them over the banks

using Fp8Ring = RingPosition<kFp8Stages>;

struct DecodeFp8Storage {
  alignas(128) uint8_t page[kFp8Stages][kFp8PageBytes];
  float scores[kFp8Halves][kFp8Rows][kScoreStride];
  float weights[kFp8Rows][kScoreStride];
  float rescale[kFp8Rows];              // what sums over earlier pages must be multiplied by
  float inverse[kFp8Rows];              // of the sum of weights
  float largest[kFp8Halves][kFp8Rows];  // magnitude of the queries
  Barrier page_full[kFp8Stages], page_empty[kFp8Stages];
  Barrier piece_full[kTileSlots], piece_empty[kTileSlots];
  Piece piece[kTileSlots];
};

}  // namespace dsv3rt
