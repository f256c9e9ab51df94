// Shared memory of the decoding kernels of 64 rows a block: a ring of pages. A page is nine 64-column slabs of 128-byte
// rows in 128-byte swizzle: eight of the latent, in two chunks, and one of rope keys, which has two places. Queries of
// a piece pass through the ring as if they were a page, on their way to registers; what of them finds no room there
// stays in shared memory. Rope keys give way to the weights once the scores are known.
#pragma once

#include <cuda_bf16.h>

#include "hopper/barrier.cuh"
#include "hopper/ring.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/decode_pieces.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kPageStages = 3, kRopeStages = 2;
constexpr int kLatentSlabs = kLatentDim / 64;
constexpr int kLatentChunks = 2;  // parts of a page's latent, each with a barrier of its own
constexpr int kChunkSlabs = kLatentSlabs / kLatentChunks;
constexpr int kQuerySteps = kCachedDim / 16;
constexpr int kDecodeThreads = 512;  // warpgroups: loading, scores, two halves of the output
constexpr int kDecodeRegisters = 65536 / kDecodeThreads;  // of a thread, at first
constexpr int kOutWarps = 8;
constexpr int kScoreArrivals = kAllLanesArrive ? 128 : 32;  // of the warpgroup of scores, at barriers that it fills

using PageSlab = __nv_bfloat16[kPageTokens * 64];
using PageRing = RingPosition<kPageStages>;
static_assert(kLatentSlabs % kLatentChunks == 0 && kRopeStages == 2 && kTileSlots == 2);

// Latents with three places. `chunk` gives the slabs of one, `keys` the descriptor of a slab as an operand.
struct WholeLatents {
  static constexpr bool kByThreads = false;  // whether threads write them or the copy engine does
  PageSlab slab[kPageStages][kLatentSlabs];

  __device__ __forceinline__ static uint32_t place(int, PageRing ring, TwoStage) { return ring.stage; }
  __device__ __forceinline__ static uint32_t parity(int, PageRing ring, TwoStage) { return ring.parity; }
  __device__ __forceinline__ PageSlab* chunk(int chunk, PageRing ring, TwoStage) {
    return slab[ring.stage] + chunk * kChunkSlabs;
  }
  __device__ __forceinline__ uint64_t keys(int index, PageRing ring, TwoStage) const {
    return k_major_swizzle128_descriptor(slab[ring.stage][0]) + index * (sizeof(PageSlab) >> 4);
  }
};

// The second chunk has two, as rope keys have.
struct SplitLatents {
  static constexpr bool kByThreads = true;
  PageSlab first[kPageStages][kChunkSlabs], second[kRopeStages][kChunkSlabs];

  __device__ __forceinline__ static uint32_t place(int chunk, PageRing ring, TwoStage rope) {
    return chunk == 0 ? ring.stage : rope.stage();
  }
  __device__ __forceinline__ static uint32_t parity(int chunk, PageRing ring, TwoStage rope) {
    return chunk == 0 ? ring.parity : rope.full_parity();
  }
  __device__ __forceinline__ PageSlab* chunk(int chunk, PageRing ring, TwoStage rope) {
    return chunk == 0 ? first[ring.stage] : second[rope.stage()];
  }
  __device__ __forceinline__ uint64_t keys(int index, PageRing ring, TwoStage rope) {
    return k_major_swizzle128_descriptor(chunk(index / kChunkSlabs, ring, rope)[0]) +
           index % kChunkSlabs * (sizeof(PageSlab) >> 4);
  }
};

// kRegisterSteps: steps of 16 columns of the queries that are kept in registers.
template <class Latents, int kRegisterSteps>
struct DecodeStorage {
  static constexpr bool kPagesByThreads = Latents::kByThreads;
  static constexpr int kQueryRegisterSteps = kRegisterSteps;
  static constexpr int kQueryRestSteps = (4 - kRegisterSteps % 4) % 4;  // of a slab that is partly in registers
  static constexpr int kQuerySlabs = (kQuerySteps - kRegisterSteps) / 4;
  static_assert(kQueryRestSteps <= 1);

  alignas(1024) Latents latent;
  alignas(1024) PageSlab rope[kRopeStages];
  alignas(1024) PageSlab queries[kQuerySlabs];  // the last columns
  __nv_bfloat16 query_step[kQueryRestSteps > 0 ? kDecodeRows * 16 : 8];  // rows of 32 bytes in 32-byte swizzle
  float rescale[kRopeStages][kDecodeRows];  // what sums over earlier pages must be multiplied by
  float inverse[kDecodeRows];  // of the sum of weights
  Barrier latent_full[kPageStages][kLatentChunks], rope_full[kRopeStages];
  Barrier page_empty[kPageStages];
  Barrier weights_full[kPageStages];
  Barrier inverse_full, inverse_empty;
  Barrier piece_full[kTileSlots], piece_empty[kTileSlots];
  Piece piece[kTileSlots];

  __device__ __forceinline__ Barrier& chunk_full(int chunk, PageRing ring, TwoStage rope) {
    return latent_full[Latents::place(chunk, ring, rope)][chunk];
  }
  __device__ __forceinline__ void wait_for_chunk(int chunk, PageRing ring, TwoStage rope) {
    chunk_full(chunk, ring, rope).wait(Latents::parity(chunk, ring, rope));
  }

  // Until it is done with: what has two places can come then, and the next page's first latents.
  __device__ __forceinline__ void wait_for_page_before_last(PageRing ring) {
    const bool wraps = ring.stage == kPageStages - 1;  // two pages back is one place ahead
    page_empty[wraps ? 0 : ring.stage + 1].wait(ring.parity ^ !wraps);
  }
};

}  // namespace dsv3rt
