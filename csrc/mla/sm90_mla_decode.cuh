// Latent attention over a paged cache. A block has 64 rows, queries x heads of one request at a time. One warp loads
// pages through the copy engine. One warpgroup keeps the queries in registers and turns scores into weights; two others
// keep 256 columns of the output each. The tensor cores multiply weights of one page with its values while the scores
// of the next are computed.
#pragma once

#include "hopper/fragment.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/decode_storage.cuh"
#include "mla/softmax.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

struct DecodeMaps {
  CUtensorMap q, cache;  // rows of 576; boxes are slabs of 64 columns and 64 rows
};

constexpr int kScoresBarrier = 1;  // named
constexpr int kOutColumns = kLatentDim / 2;
constexpr int kPeakSlack = 8;  // so that few pages make the output's warps rescale what they have

// ---- Loading

struct PageLoader {
  DecodeStorage& storage;
  PageRing ring;
  int rope_stage = 0;

  // Latents have three places and rope keys two: when the page before the last is done with, this one's rope keys can
  // come, and the next one's latent.
  __device__ __forceinline__ void load(const CUtensorMap& map, int row) {
#pragma unroll 1
    for (int slab = 0; slab < kLatentSlabs; ++slab) {
      Barrier& full = storage.latent_full[ring.stage][slab / kChunkSlabs];
      if (slab % kChunkSlabs == 0) full.arrive_and_expect(kChunkSlabs * sizeof(PageSlab));
      tma_load_2d(storage.latent[ring.stage][slab], map, full, slab * 64, row, L2Hint::kEvictFirst);
    }
    const bool wraps = ring.stage == kPageStages - 1;  // two pages back is one place ahead
    storage.page_empty[wraps ? 0 : ring.stage + 1].wait(ring.parity ^ !wraps);
    Barrier& full = storage.rope_full[rope_stage];
    full.arrive_and_expect(sizeof(PageSlab));
    tma_load_2d(storage.rope[rope_stage], map, full, kLatentDim, row, L2Hint::kEvictFirst);
    ring.advance();
    rope_stage ^= 1;
  }
};

// One warp finds the pieces, another loads their pages.
__device__ __forceinline__ void producer_find_pieces(DecodeStorage& storage, const MlaDecodeParams& params) {
  PieceCursor cursor(params, blockIdx.y);
  TwoStage slot;
  bool any = true;
  while (any) {
    const Piece piece = cursor.next();
    any = piece.first_page < piece.end_page;
    if (threadIdx.x % 32 == 0) {
      storage.piece_empty[slot.stage()].wait(slot.empty_parity());
      storage.piece[slot.stage()] = piece;
      storage.piece_full[slot.stage()].arrive();
    }
    __syncwarp();
    ++slot.count;
  }
}

__device__ __forceinline__ void producer_load_pieces(DecodeStorage& storage, const DecodeMaps& maps,
                                                     const MlaDecodeParams& params) {
  TwoStage slot;
  PageLoader loader{storage};
  while (true) {
    storage.piece_full[slot.stage()].wait(slot.full_parity());
    const Piece& piece = storage.piece[slot.stage()];
    int num_pages = piece.end_page - piece.first_page;
    if (num_pages == 0) return;
    const int rows = params.num_queries * params.num_heads;
    const int32_t* pages = params.block_table + piece.request * params.block_table_stride + piece.first_page;
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

// ---- Scores

using Scores = float[kPageTokens / 2];
using Queries = uint32_t[kQueryRegisterSteps][4];  // fragments of 16 columns

// First of a thread's two rows; the other is eight below.
__device__ __forceinline__ int decode_row(int thread) { return thread % 128 / 32 * 16 + thread % 32 / 4; }
__device__ __forceinline__ int decode_row() { return decode_row(threadIdx.x); }

// Address of the 16-byte row that this lane names for stmatrix and ldmatrix: 16 rows of a warp, 16 columns from `step`.
__device__ __forceinline__ uint32_t fragment_address(const PageSlab& slab, int step) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  return smem_address(&slab) + row * 128 + ((step * 2 + lane / 16) ^ row % 8) * 16;
}

__device__ __forceinline__ void copy_slab(PageSlab& target, const PageSlab& source) {
#pragma unroll
  for (int chunk = 0; chunk < sizeof(PageSlab) / 16 / 128; ++chunk) {
    const int index = chunk * 128 + threadIdx.x % 128;
    reinterpret_cast<uint4*>(target)[index] = reinterpret_cast<const uint4*>(source)[index];
  }
}

__device__ __forceinline__ void load_queries(DecodeStorage& storage, PageRing ring, TwoStage rope, Queries& queries) {
  const auto& latent = storage.latent[ring.stage];
  for (Barrier& full : storage.latent_full[ring.stage]) full.wait(ring.parity);
#pragma unroll
  for (int step = 0; step < kQueryRegisterSteps; ++step) {
    load_matrices(queries[step], fragment_address(latent[step / 4], step % 4));
  }
  storage.rope_full[rope.stage()].wait(rope.full_parity());
  named_barrier_sync(kScoresBarrier, 128);  // no warp multiplies by the queries before any more
  uint32_t words[4];
  load_matrices(words, fragment_address(latent[kQueryRegisterSteps / 4], kQueryRegisterSteps % 4));
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
  store_matrices(smem_address(storage.query_step) + row * 32 + (half ^ row / 4 % 2) * 16, words);
  copy_slab(storage.queries[0], latent[kLatentSlabs - 1]);
  copy_slab(storage.queries[1], storage.rope[rope.stage()]);
  fence_async_proxy();
  named_barrier_sync(kScoresBarrier, 128);
}

__device__ __forceinline__ void start_latent_scores(DecodeStorage& storage, PageRing ring, const Queries& queries,
                                                    Scores& scores) {
  const uint64_t keys = k_major_swizzle128_descriptor(storage.latent[ring.stage][0]);
  const uint64_t shared_step = k_major_swizzle32_descriptor(storage.query_step);
  const uint64_t shared_slab = k_major_swizzle128_descriptor(storage.queries[0]);
  pin_registers(scores);
#pragma unroll
  for (int step = 0; step < kLatentSlabs * 4; ++step) {
    if (step % (kChunkSlabs * 4) == 0) {
      storage.latent_full[ring.stage][step / (kChunkSlabs * 4)].wait(ring.parity);
      wgmma_fence();
    }
    const uint64_t columns = keys + step / 4 * (sizeof(PageSlab) >> 4) + step % 4 * 2;
    if (step < kQueryRegisterSteps) {
      WgmmaBF16<kPageTokens, Major::kK>::multiply(scores, queries[step], columns, step != 0);
    } else {
      const uint64_t shared = step == kQueryRegisterSteps ? shared_step : shared_slab + step % 4 * 2;
      WgmmaBF16<kPageTokens, Major::kK>::multiply(scores, shared, columns, true);
    }
    if (step % (kChunkSlabs * 4) == kChunkSlabs * 4 - 1) wgmma_commit();
  }
  pin_registers(scores);
}

__device__ __forceinline__ void start_rope_scores(DecodeStorage& storage, TwoStage rope, Scores& scores) {
  const uint64_t keys = k_major_swizzle128_descriptor(storage.rope[rope.stage()]);
  const uint64_t shared_queries = k_major_swizzle128_descriptor(storage.queries[1]);
  storage.rope_full[rope.stage()].wait(rope.full_parity());
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WgmmaBF16<kPageTokens, Major::kK>::multiply(scores, shared_queries + step * 2, keys + step * 2, true);
  }
  wgmma_commit();
  pin_registers(scores);
}

// Slots past the end hold anything. Their weights are zero, but zero times NaN is not.
__device__ __forceinline__ void clear_values(PageSlab (&latent)[kLatentSlabs], int first_row) {
  constexpr int kChunks = 128 / 16;
#pragma unroll 1
  for (int chunk = first_row * kChunks + threadIdx.x % 128; chunk < kPageTokens * kChunks; chunk += 128) {
#pragma unroll
    for (PageSlab& slab : latent) reinterpret_cast<uint4*>(slab)[chunk] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void mask_page(DecodeStorage& storage, const MlaDecodeParams& params, const Piece& piece,
                                          int page, int stage, Scores& scores) {
  const int thread = thread_idx_read_here();
  const int first_column = page * kPageTokens + thread % 4 * 2, end = piece.length - page * kPageTokens;
  const int first_row = blockIdx.x * kDecodeRows + decode_row(thread);
  const int seen[2] = {tokens_seen(params, piece.length, first_row) - first_column,
                       tokens_seen(params, piece.length, first_row + 8) - first_column};
  mask_scores<kPageTokens>(scores, seen);
  if (end < kPageTokens) clear_values(storage.latent[stage], end);
}

__device__ __forceinline__ void store_weights(DecodeStorage& storage, int rope_stage, const Scores& scores,
                                              const SoftmaxState& state) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack_bf16(scores[step * 8 + 2 * i], scores[step * 8 + 2 * i + 1]);
    store_matrices(fragment_address(storage.rope[rope_stage], step), words);
  }
  if (threadIdx.x % 4 == 0) {
    storage.rescale[rope_stage][decode_row()] = state.rescale[0];
    storage.rescale[rope_stage][decode_row() + 8] = state.rescale[1];
  }
  fence_async_proxy();
  __syncwarp();
}

// Where a piece that is not a whole result leaves its own, in rows of 64.
__device__ __forceinline__ int64_t partial_row(const MlaDecodeParams& params, int partial) {
  const int64_t part = int64_t(blockIdx.x) * params.grid.parts + blockIdx.y;
  return (part * kPartialsAPart + partial) * kDecodeRows;
}

__device__ __forceinline__ void finish_scores(DecodeStorage& storage, const MlaDecodeParams& params, const Piece& piece,
                                              const SoftmaxState& state) {
  constexpr float kLn2 = 0.693147180559945309f;
  const int rows = params.num_queries * params.num_heads;
  const int thread = thread_idx_read_here();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_over_quad(state.sum[half]);
    const int row = decode_row(thread) + half * 8, request_row = blockIdx.x * kDecodeRows + row;
    if (thread % 4 != 0) continue;
    storage.inverse[row] = sum == 0 ? 0 : 1 / sum;
    const float lse = offset_of(state.peak[half], params.scale_log2) + log2f(sum);
    if (request_row >= rows) continue;
    if (piece.partial < 0) {
      params.lse[int64_t(piece.request) * rows + request_row] = lse * kLn2;
    } else {
      params.partial_lse[partial_row(params, piece.partial) + row] = lse;
    }
  }
}

__device__ __forceinline__ void consumer_score_pieces(DecodeStorage& storage, const MlaDecodeParams& params) {
  const bool leads_quad = threadIdx.x % 4 == 0;  // such threads write for others, and speak for what they wrote
  TwoStage slot, rope;
  PageRing ring;
  Queries queries;
  Scores scores;
  while (true) {
    storage.piece_full[slot.stage()].wait(slot.full_parity());
    const Piece& piece = storage.piece[slot.stage()];
    if (piece.first_page == piece.end_page) return;
    load_queries(storage, ring, rope, queries);
    if (leads_quad) storage.weights_full[ring.stage].arrive();
    ring.advance();
    ++rope.count;
    SoftmaxState state;
#pragma unroll 1
    for (int page = piece.first_page; page < piece.end_page; ++page) {
      start_latent_scores(storage, ring, queries, scores);
      wgmma_wait<1>();
      // Weights of the page before are held back until here, so that their product fills the time in which the next
      // scores become weights.
      if (page != piece.first_page && leads_quad) storage.weights_full[ring.stage_before()].arrive();
      start_rope_scores(storage, rope, scores);
      wgmma_wait<0>();
      pin_registers(scores);
      if (page >= piece.whole_pages) mask_page(storage, params, piece, page, ring.stage, scores);
      take_block<kPageTokens, kPeakSlack>(state, scores, params.scale_log2);
      named_barrier_sync(kScoresBarrier, 128);  // all warps have read the rope keys
      store_weights(storage, rope.stage(), scores, state);
      ring.advance();
      ++rope.count;
    }
    if (leads_quad) storage.weights_full[ring.stage_before()].arrive();
    storage.inverse_empty.wait(slot.count & 1 ^ 1);
    finish_scores(storage, params, piece, state);
    if (leads_quad) storage.inverse_full.arrive();
    storage.piece_empty[slot.stage()].arrive();
    ++slot.count;
  }
}

// ---- Output

// Of one instruction: a wider one wants more registers than the compiler grants a block of 512 threads.
constexpr int kProductColumns = 128;
using Out = float[kOutColumns / kProductColumns][kProductColumns / 2];

__device__ __forceinline__ void add_page(DecodeStorage& storage, PageRing ring, TwoStage rope, int half, Out& out) {
  storage.weights_full[ring.stage].wait(ring.parity);
  const float* of_row = &storage.rescale[rope.stage()][decode_row()];
  const float rescale[2] = {of_row[0], of_row[8]};
  if (__any_sync(~0u, rescale[0] != 1 || rescale[1] != 1)) {  // else the tensor cores would wait for nothing
#pragma unroll
    for (float (&columns)[kProductColumns / 2] : out) scale_rows(columns, rescale);
  }
#pragma unroll
  for (float (&columns)[kProductColumns / 2] : out) pin_registers(columns);
  const uint64_t weights = k_major_swizzle128_descriptor(storage.rope[rope.stage()]);
  const PageSlab& first_slab = storage.latent[ring.stage][half * (kLatentSlabs / 2)];
  const uint64_t values = mn_major_swizzle128_descriptor(first_slab, sizeof(PageSlab));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kPageTokens / 16; ++step) {
#pragma unroll
    for (int i = 0; i < kOutColumns / kProductColumns; ++i) {
      const uint64_t slabs = values + i * (kProductColumns / 64 * sizeof(PageSlab) >> 4);
      WgmmaBF16<kProductColumns, Major::kMN>::multiply(out[i], weights + step * 2, slabs + step * 128, true);
    }
  }
  wgmma_commit();
#pragma unroll
  for (float (&columns)[kProductColumns / 2] : out) pin_registers(columns);
  wgmma_wait<0>();
#pragma unroll
  for (float (&columns)[kProductColumns / 2] : out) pin_registers(columns);
}

__device__ __forceinline__ void store_partial(float* target, int end_row, const Out& out) {
  const int row = decode_row();
  constexpr int kOctets = kProductColumns / 8;
  target += row * kLatentDim + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= end_row) continue;
#pragma unroll
    for (int i = 0; i < kOutColumns / 8; ++i) {
      *reinterpret_cast<float2*>(target + half * 8 * kLatentDim + i * 8) =
          make_float2(out[i / kOctets][i % kOctets * 4 + half * 2], out[i / kOctets][i % kOctets * 4 + half * 2 + 1]);
    }
  }
}

__device__ __forceinline__ void store_out(const MlaDecodeParams& params, const Piece& piece, int half, Out& out) {
  const int rows = params.num_queries * params.num_heads, first_row = blockIdx.x * kDecodeRows;
  if (piece.partial < 0) {
    const int64_t first = int64_t(piece.request) * rows + first_row;
    auto* target = static_cast<__nv_bfloat16*>(params.out) + first * kLatentDim + half * kOutColumns;
#pragma unroll
    for (int i = 0; i < kOutColumns / kProductColumns; ++i) {
      store_rows<kProductColumns / 8>(target + i * kProductColumns, kLatentDim, decode_row(), rows - first_row, out[i],
                                      0, 1.0f);
    }
  } else {
    float* target = params.partial_out + partial_row(params, piece.partial) * kLatentDim + half * kOutColumns;
    store_partial(target, rows - first_row, out);
  }
}

__device__ __forceinline__ void consumer_add_pieces(DecodeStorage& storage, const MlaDecodeParams& params, int half) {
  TwoStage slot, rope;
  PageRing ring;
  while (true) {
    storage.piece_full[slot.stage()].wait(slot.full_parity());
    int pages = storage.piece[slot.stage()].end_page - storage.piece[slot.stage()].first_page;
    if (pages == 0) return;
    storage.weights_full[ring.stage].wait(ring.parity);  // the queries are in registers
    storage.page_empty[ring.stage].arrive_for_warp();
    ring.advance();
    ++rope.count;
    Out out = {};
#pragma unroll 1
    for (; pages > 0; --pages) {
      add_page(storage, ring, rope, half, out);
      __syncwarp();  // the first lane's arrival speaks for all lanes' reads
      storage.page_empty[ring.stage].arrive_for_warp();
      ring.advance();
      ++rope.count;
    }
    storage.inverse_full.wait(slot.count & 1);
    const float inverse[2] = {storage.inverse[decode_row()], storage.inverse[decode_row() + 8]};
    storage.inverse_empty.arrive();
#pragma unroll
    for (float (&columns)[kProductColumns / 2] : out) scale_rows(columns, inverse);
    store_out(params, storage.piece[slot.stage()], half, out);
    storage.piece_empty[slot.stage()].arrive();
    ++slot.count;
  }
}

__global__ void __launch_bounds__(kDecodeThreads, 1)
    sm90_mla_decode_kernel(const __grid_constant__ DecodeMaps maps, const __grid_constant__ MlaDecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<DecodeStorage*>(shared_bytes);
  let_next_grid_start();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kPageStages; ++stage) {
      for (Barrier& full : storage.latent_full[stage]) full.init(1);
      storage.page_empty[stage].init(kOutWarps * kArrivalsOfAWarp);
      storage.weights_full[stage].init(32);
    }
    for (Barrier& full : storage.rope_full) full.init(1);
    storage.inverse_full.init(32);
    storage.inverse_empty.init(32 * kOutWarps);
    for (int slot = 0; slot < kTileSlots; ++slot) {
      storage.piece_full[slot].init(1);
      storage.piece_empty[slot].init(1 + 128 + 32 * kOutWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    release_registers<24>();
    if (threadIdx.x == 0) producer_load_pieces(storage, maps, params);
    if (warp == 1) producer_find_pieces(storage, params);
  } else if (warp < 8) {
    claim_registers<168>();
    consumer_score_pieces(storage, params);
  } else {
    claim_registers<160>();
    consumer_add_pieces(storage, params, warp / 12);
  }
}

}  // namespace dsv3rt
