// Pages of an FP8 cache for the kernel that reads BF16 ones: four warps read a page from global memory, make BF16 of
// its latents in registers and write it where the copy engine would have put it. Each warp has a quarter of the tokens.
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

// A unit is what a warp loads at once, 16 bytes a lane: a chunk of two tokens' latents, or four tokens' rope keys.
constexpr int kWidenTokens = kPageTokens / kWidenWarps;  // of a warp
constexpr int kChunkUnits = kWidenTokens / 2;
constexpr int kLatentUnits = kChunkUnits * kLatentChunks;
constexpr int kRopeUnits = kWidenTokens / 4;
constexpr int kPageUnits = kLatentUnits + kRopeUnits;
constexpr int kUnitsAhead = 4;  // under way, across pages too; as many as registers allow
static_assert(kPageUnits % kUnitsAhead == 0);

// Eight E4M3 numbers times a scale.
__device__ __forceinline__ uint4 scaled_bf16(uint2 codes, float scale) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const HalfPairs pairs = widen_e4m3(i == 0 ? codes.x : codes.y);
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
    aim(page);
#pragma unroll
    for (int unit = 0; unit < kUnitsAhead; ++unit) load(unit);
  }

  // Queries of a piece pass through the ring as a page does, by the copy engine.
  __device__ __forceinline__ void load_queries(const CUtensorMap& map, int row) {
#pragma unroll
    for (int chunk = 0; chunk < kLatentChunks; ++chunk) {
      Barrier& full = storage_.chunk_full(chunk, ring_, rope_);
      expect(full);
      copy(storage_.latent.chunk(chunk, ring_, rope_)[warp_], map, full, chunk * kChunkSlabs + warp_, row);
      if (chunk == 0) storage_.wait_for_page_before_last(ring_);
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

  // The page's first units are under way; in the end `next`'s are.
  __device__ __forceinline__ void widen(int next) {
    // A lane has 16 columns, two parts of a row of a slab. Neighbouring slabs' lanes write first parts and second ones
    // at the same time, so that eight lanes meet eight different parts, whose place the swizzle tells.
    const bool second_first = lane() / 4 % 2 == 1;
    const int slab = lane() % 16 / 4, part = lane() % 4 * 2 + second_first;
#pragma unroll
    for (int chunk = 0; chunk < kLatentChunks; ++chunk) {
      if (chunk == 1) storage_.wait_for_page_before_last(ring_);
      const uint32_t target = smem_address(storage_.latent.chunk(chunk, ring_, rope_)[slab]) + latent_token(0) * 128 +
                              (part ^ latent_token(0) % 8) * 16;
#pragma unroll
      for (int i = 0; i < kChunkUnits; ++i) {
        const int unit = chunk * kChunkUnits + i;
        const uint4 codes = units_[unit % kUnitsAhead];
        const float scale = scales_[unit % kUnitsAhead];
        const uint2 low = make_uint2(codes.x, codes.y), high = make_uint2(codes.z, codes.w);
        const uint32_t row = (target ^ i * 2 % 8 * 16) + i * 2 * 128;
        store_shared_quad(row, scaled_bf16(second_first ? high : low, scale));
        store_shared_quad(row ^ 16, scaled_bf16(second_first ? low : high, scale));
        load_ahead(unit, next);
      }
      hand_over(storage_.chunk_full(chunk, ring_, rope_));
    }
    const uint32_t rope = smem_address(storage_.rope[rope_.stage()]) + rope_token(0) * 128;
#pragma unroll
    for (int i = 0; i < kRopeUnits; ++i) {
      const int unit = kLatentUnits + i;
      store_shared_quad(rope + i * 4 * 128 + (lane() % 8 ^ rope_token(i) % 8) * 16, units_[unit % kUnitsAhead]);
      load_ahead(unit, next);
    }
    hand_over(storage_.rope_full[rope_.stage()]);
    advance();
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ const uint8_t* page_at(int page) const { return cache_ + int64_t(page) * kPageBytes; }

  // This lane's of the i-th unit of a chunk, or of rope keys.
  __device__ __forceinline__ int latent_token(int i) const { return warp_ * kWidenTokens + i * 2 + lane() / 16; }
  __device__ __forceinline__ int rope_token(int i) const { return warp_ * kWidenTokens + i * 4 + lane() / 8; }

  __device__ __forceinline__ void aim(int page) {
    source_ = page_at(page) + latent_token(0) * kFp8TokenBytes + lane() % 16 * 16;
  }

  __device__ __forceinline__ void load(int unit) {
    uint4& target = units_[unit % kUnitsAhead];
    if (unit < kLatentUnits) {
      const int further = unit % kChunkUnits * 2 * kFp8TokenBytes, chunk = unit / kChunkUnits;
      target = load_once(source_ + further + chunk * (kLatentDim / kLatentChunks));
      const uint8_t* scales = source_ + (kLatentDim - lane() % 16 * 16 + lane() % 16 / 8 * 4);
      scales_[unit % kUnitsAhead] = __ldg(reinterpret_cast<const float*>(scales + further) + chunk * (kChunkSlabs / 2));
    } else {
      const int first = (rope_token(0) - latent_token(0)) * kFp8TokenBytes + kFp8RopeOffset;
      const uint8_t* keys = source_ + (first + lane() % 8 * 16 - lane() % 16 * 16);
      target = load_once(keys + (unit - kLatentUnits) * 4 * kFp8TokenBytes);
    }
  }

  // What takes the place of a unit that has been written.
  __device__ __forceinline__ void load_ahead(int unit, int next) {
    if (unit + kUnitsAhead == kPageUnits) aim(next);
    load((unit + kUnitsAhead) % kPageUnits);
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
  // Who multiplies fences the proxies. Here the fence would wait for the loads that are under way.
  __device__ __forceinline__ void hand_over(Barrier& full) const {
    __syncwarp();
    full.arrive_for_warp();
  }

  __device__ __forceinline__ void advance() {
    ring_.advance();
    ++rope_.count;
  }

  WidenedStorage& storage_;
  const uint8_t* cache_;
  int warp_;
  const uint8_t* source_;  // this lane's of the first latents of the page that is loaded
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
  const int rows = params.num_queries * params.num_heads;
  bool begun = false;
  while (true) {
    const Piece piece = cursor.next();
    if (warp == 0 && threadIdx.x == 0) publish_piece(storage, slot, piece);
    __syncwarp();
    int left = piece.end_page - piece.first_page;
    if (left == 0) return;
    ++slot.count;
    widener.load_queries(query_map, piece.request * rows + blockIdx.x * kDecodeRows);
    const int32_t* pages = first_entry(params, piece);
    if (!begun) widener.begin(*pages);
    begun = true;
    PieceCursor ahead = cursor;  // the piece is found again when its turn comes: to keep it takes registers
    const Piece coming = ahead.next();
    const int following = coming.first_page < coming.end_page ? *first_entry(params, coming) : *pages;
    const auto entry = [&](int further) { return further < left ? pages[further] : following; };
    int next = entry(1);
    widener.fetch(next);
#pragma unroll 1
    for (; left > 0; --left, ++pages) {
      const int after = entry(2);  // there when it is needed
      widener.widen(next);
      widener.fetch(after);
      next = after;
    }
  }
}

}  // namespace dsv3rt
