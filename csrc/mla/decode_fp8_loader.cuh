// Brings the pages of a block's pieces of an FP8 cache, as they lie in memory, by halves.
#pragma once

#include "hopper/ring.cuh"
#include "hopper/tma.cuh"
#include "mla/decode_fp8_storage.cuh"
#include "mla/decode_params.h"
#include "mla/decode_pieces.cuh"

namespace dsv3rt {

__device__ __forceinline__ void producer_load_fp8_pieces(DecodeFp8Storage& storage, const MlaDecodeParams& params) {
  PieceCursor cursor(params, blockIdx.y);
  TwoStage slot;
  RingPosition<kFp8Stages> ring;
  while (true) {
    const Piece piece = cursor.next();
    const int num_pages = piece.end_page - piece.first_page;
    if (threadIdx.x % 32 == 0) {
      publish_piece(storage, slot, piece);
      const int32_t* pages = first_entry(params, piece);
      int upcoming = num_pages > 0 ? *pages : 0;
#pragma unroll 1
      for (int left = num_pages; left > 0; --left) {
        const auto* source = static_cast<const uint8_t*>(params.cache) + int64_t(upcoming) * kFp8PageBytes;
        if (left > 1) upcoming = *++pages;
#pragma unroll
        for (int half = 0; half < kFp8Halves; ++half) {
          Barrier& full = storage.page_full[ring.stage][half];
          storage.page_empty[ring.stage][half].wait(ring.parity ^ 1);
          full.arrive_and_expect(kFp8HalfBytes);
          bulk_load(storage.page[ring.stage] + half * kFp8HalfBytes, source + half * kFp8HalfBytes, kFp8HalfBytes, full,
                    L2Hint::kEvictFirst);
        }
        ring.advance();
      }
    }
    __syncwarp();
    if (num_pages == 0) return;
    ++slot.count;
  }
}

}  // namespace dsv3rt
