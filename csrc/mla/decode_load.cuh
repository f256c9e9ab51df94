// Finds the pieces of a block and loads the pages of a BF16 cache by the copy engine.
#pragma once

#include "hopper/tma.cuh"
#include "mla/decode_params.h"
#include "mla/decode_pieces.cuh"
#include "mla/decode_storage.cuh"

namespace dsv3rt {

struct DecodeMaps {
  CUtensorMap q, cache;  // rows of 576; boxes are slabs of 64 columns and 64 rows
};

// Queries: 27 of 36 steps stay in registers.
using Bf16Storage = DecodeStorage<WholeLatents, 27>;

struct PageLoader {
  Bf16Storage& storage;
  PageRing ring;
  int rope_stage = 0;

  // Latents have three places and rope keys two: when the page before the last is done with, this one's rope keys can
  // come, and the next one's latent.
  __device__ __forceinline__ void load(const CUtensorMap& map, int row) {
#pragma unroll 1
    for (int slab = 0; slab < kLatentSlabs; ++slab) {
      Barrier& full = storage.latent_full[ring.stage][slab / kChunkSlabs];
      if (slab % kChunkSlabs == 0) full.arrive_and_expect(kChunkSlabs * sizeof(PageSlab));
      tma_load_2d(storage.latent.slab[ring.stage][slab], map, full, slab * 64, row, L2Hint::kEvictFirst);
    }
    storage.wait_for_page_before_last(ring);
    Barrier& full = storage.rope_full[rope_stage];
    full.arrive_and_expect(sizeof(PageSlab));
    tma_load_2d(storage.rope[rope_stage], map, full, kLatentDim, row, L2Hint::kEvictFirst);
    ring.advance();
    rope_stage ^= 1;
  }
};

// One warp finds the pieces, another loads their pages.
__device__ __forceinline__ void producer_find_pieces(Bf16Storage& storage, const MlaDecodeParams& params) {
  PieceCursor cursor(params, blockIdx.y);
  TwoStage slot;
  bool any = true;
  while (any) {
    const Piece piece = cursor.next();
    any = piece.first_page < piece.end_page;
    if (threadIdx.x % 32 == 0) publish_piece(storage, slot, piece);
    __syncwarp();
    ++slot.count;
  }
}

__device__ __forceinline__ void producer_load_pieces(Bf16Storage& storage, const DecodeMaps& maps,
                                                     const MlaDecodeParams& params) {
  TwoStage slot;
  PageLoader loader{storage};
  while (true) {
    storage.piece_full[slot.stage()].wait(slot.full_parity());
    const Piece& piece = storage.piece[slot.stage()];
    int num_pages = piece.end_page - piece.first_page;
    if (num_pages == 0) return;
    const int rows = params.num_queries * params.num_heads;
    const int32_t* pages = first_entry(params, piece);
    int upcoming = *pages;
    loader.load(maps.q, piece.request * rows + blockIdx.x * kDecodeRows);
#pragma unroll 1
    for (; num_pages > 0; --num_pages) {
      const int page = upcoming;
      if (num_pages > 1) upcoming = *++pages;  // there when it is needed
      loader.load(maps.cache, page * kPageTokens);
    }
    storage.piece_empty[slot.stage()].arrive();
    ++slot.count;
  }
}

}  // namespace dsv3rt
