// Pages of an FP8 cache for the kernel that reads BF16 ones: four warps read a page from global memory, make BF16 of
// its latents in registers and write it where the copy engine would have put it. Each warp has one slab of either chunk
// of the latents, and a quarter of the rope keys.
#pragma once

#include <cuda_fp16.h>

#include "hopper/convert.cuh"
#include "hopper/fragment.cuh"
#include "hopper/memory.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "mla/decode_params.h"
#include "mla/decode_pieces.cuh"
#include "mla/decode_storage.cuh"

namespace dsv3rt {

// Queries: 12 of 36 steps stay in registers.
using WidenedStorage = DecodeStorage<SplitLatents, 12>;

constexpr int kWidenWarps = kChunkSlabs;
constexpr int kPageBytes = kPageTokens * kFp8TokenBytes;

// A unit is what a warp loads at once, 16 bytes a lane: eight tokens' 64 columns, or four tokens' rope keys.
constexpr int kChunkUnits = kPageTokens / 8;
constexpr int kLatentUnits = kChunkUnits * kLatentChunks;
constexpr int kRopeUnits = kPageTokens / kWidenWarps / 4;
constexpr int kPageUnits = kLatentUnits + kRopeUnits;
constexpr int kUnitsAhead = 5;  // under way, across pages too; as many as registers allow
static_assert(kPageUnits % kUnitsAhead == 0);

// Eight E4M3 numbers times a scale.
__device__ __forceinline__ uint4 scaled_bf16(uint32_t first, uint32_t second, float scale) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const HalfPairs pairs = widen_e4m3(i == 0 ? first : second);
    const float2 low = __half22float2(reinterpret_cast<const __half2&>(pairs.lower));
    const float2 high = __half22float2(reinterpret_cast<const __half2&>(pairs.upper));
    words[2 * i] = pack_bf16(low.x * scale, low.y * scale);
    words[2 * i + 1] = pack_bf16(high.x * scale, high.y * scale);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

class PageWidener {
 public:
  __device__ __forceinline__ PageWidener(WidenedStorage& storage, const void* cache, int warp)
      : storage_(storage), cache_(static_cast<const uint8_t*>(cache)), warp_(warp) {}

  // Into the L2.
  __device__ __forceinline__ void fetch(int page) const {
    if (threadIdx.x == 0) bulk_prefetch(page_at(page), kPageBytes);
  }

  __device__ __forceinline__ void begin(int page) {
#pragma unroll
    for (int unit = 0; unit < kUnitsAhead; ++unit) load(unit, page_at(page));
  }

  // Queries of a piece pass through the ring as a page does, by the copy engine.
  __device__ __forceinline__ void load_queries(const CUtensorMap& map, int row) {
#pragma unroll
    for (int chunk = 0; chunk < kLatentChunks; ++chunk) {
      Barrier& full = storage_.chunk_full(chunk, ring_, rope_);
      expect(full);
      copy(storage_.latent.chunk(chunk, ring_, rope_)[warp_], map, full, chunk * kChunkSlabs + warp_, row);
      if (chunk == 0) wait_for_next_stage();
    }
    Barrier& full = storage_.rope_full[rope_.stage()];
    if (warp_ == 0) {
      expect(full);
      copy(storage_.rope[rope_.stage()], map, full, kLatentSlabs, row);
    } else {
      full.arrive_for_warp();
    }
    advance();
  }

  // `page`'s first units are under way; in the end `next`'s are.
  __device__ __forceinline__ void widen(int page, int next) {
    const uint8_t *const source = page_at(page), *const next_source = page_at(next);
#pragma unroll
    for (int chunk = 0; chunk < kLatentChunks; ++chunk) {
      if (chunk == 1) wait_for_next_stage();
      const uint32_t target =
          smem_address(storage_.latent.chunk(chunk, ring_, rope_)[warp_]) + row() * 128 + (quarter() * 2 ^ row()) * 16;
#pragma unroll
      for (int i = 0; i < kChunkUnits; ++i) {
        const int unit = chunk * kChunkUnits + i;
        const uint4 codes = units_[unit % kUnitsAhead];
        const float scale = scales_[unit % kUnitsAhead];
        store_shared_quad(target + i * 8 * 128, scaled_bf16(codes.x, codes.y, scale));
        store_shared_quad((target ^ 16) + i * 8 * 128, scaled_bf16(codes.z, codes.w, scale));
        load(unit + kUnitsAhead, source, next_source);
      }
      hand_over(storage_.chunk_full(chunk, ring_, rope_));
    }
    const uint32_t rope = smem_address(storage_.rope[rope_.stage()]) + rope_token(0) * 128;
#pragma unroll
    for (int i = 0; i < kRopeUnits; ++i) {
      const int unit = kLatentUnits + i;
      store_shared_quad(rope + i * 4 * 128 + (row() ^ rope_token(i) % 8) * 16, units_[unit % kUnitsAhead]);
      load(unit + kUnitsAhead, source, next_source);
    }
    hand_over(storage_.rope_full[rope_.stage()]);
    advance();
  }

 private:
  // Of a unit's tokens, or of the parts of a rope key; the other.
  __device__ __forceinline__ static int row() { return threadIdx.x % 8; }
  __device__ __forceinline__ static int quarter() { return threadIdx.x % 32 / 8; }

  __device__ __forceinline__ const uint8_t* page_at(int page) const { return cache_ + int64_t(page) * kPageBytes; }

  __device__ __forceinline__ int rope_token(int unit) const {
    return warp_ * (kPageTokens / kWidenWarps) + unit * 4 + quarter();
  }

  __device__ __forceinline__ void load(int unit, const uint8_t* source) {
    uint4& target = units_[unit % kUnitsAhead];
    if (unit < kLatentUnits) {
      const int chunk = unit / kChunkUnits;
      const uint8_t* of_token = source + (unit % kChunkUnits * 8 + row()) * kFp8TokenBytes;
      target = load_once(of_token + (chunk * kChunkSlabs + warp_) * 64 + quarter() * 16);
      const auto* scales = reinterpret_cast<const float*>(of_token + kLatentDim);
      scales_[unit % kUnitsAhead] = __ldg(scales + chunk * (kChunkSlabs / 2) + warp_ / 2);
    } else {
      target = load_once(source + rope_token(unit - kLatentUnits) * kFp8TokenBytes + kFp8RopeOffset + row() * 16);
    }
  }
  __device__ __forceinline__ void load(int unit, const uint8_t* source, const uint8_t* next_source) {
    unit < kPageUnits ? load(unit, source) : load(unit - kPageUnits, next_source);
  }

  __device__ __forceinline__ void expect(Barrier& full) const {
    if (threadIdx.x % 32 == 0) {
      full.arrive_and_expect(sizeof(PageSlab));
    } else if (kAllLanesArrive) {
      full.arrive();
    }
  }
  __device__ __forceinline__ void copy(PageSlab& target, const CUtensorMap& map, Barrier& full, int slab,
                                       int row) const {
    if (threadIdx.x % 32 == 0) tma_load_2d(target, map, full, slab * 64, row, L2Hint::kEvictFirst);
  }
  __device__ __forceinline__ void hand_over(Barrier& full) const {
    fence_async_proxy();
    __syncwarp();
    full.arrive_for_warp();
  }

  // When the page before the last is done with, this one's rope keys and second chunk can come, and the next one's
  // first.
  __device__ __forceinline__ void wait_for_next_stage() const {
    const bool wraps = ring_.stage == kPageStages - 1;  // two pages back is one place ahead
    storage_.page_empty[wraps ? 0 : ring_.stage + 1].wait(ring_.parity ^ !wraps);
  }
  __device__ __forceinline__ void advance() {
    ring_.advance();
    ++rope_.count;
  }

  WidenedStorage& storage_;
  const uint8_t* cache_;
  int warp_;
  PageRing ring_;
  TwoStage rope_;
  uint4 units_[kUnitsAhead];
  float scales_[kUnitsAhead];
};

__device__ __forceinline__ void producer_widen_pieces(WidenedStorage& storage, const CUtensorMap& query_map,
                                                      const MlaDecodeParams& params, int warp) {
  PieceCursor cursor(params, blockIdx.y);
  TwoStage slot;
  PageWidener widener(storage, params.cache, warp);
  const auto first_entry = [&](const Piece& piece) {
    return params.block_table + piece.request * params.block_table_stride + piece.first_page;
  };
  const int rows = params.num_queries * params.num_heads;
  int page = -1;  // the coming one
  while (true) {
    const Piece piece = cursor.next();
    if (warp == 0 && threadIdx.x == 0) {
      storage.piece_empty[slot.stage()].wait(slot.empty_parity());
      storage.piece[slot.stage()] = piece;
      storage.piece_full[slot.stage()].arrive();
    }
    __syncwarp();
    int left = piece.end_page - piece.first_page;
    if (left == 0) return;
    ++slot.count;
    widener.load_queries(query_map, piece.request * rows + blockIdx.x * kDecodeRows);
    const int32_t* pages = first_entry(piece);
    if (page < 0) widener.begin(page = *pages);
    PieceCursor ahead = cursor;
    const Piece coming = ahead.next();
    const int following = coming.first_page < coming.end_page ? *first_entry(coming) : page;
    const auto entry = [&](int further) { return further < left ? pages[further] : following; };
    int next = entry(1), after = entry(2);
    widener.fetch(next);
#pragma unroll 1
    for (; left > 0; --left, ++pages) {
      const int one_more = entry(3);  // there when it is needed
      widener.fetch(after);
      widener.widen(page, next);
      page = next, next = after, after = one_more;
    }
  }
}

}  // namespace dsv3rt
