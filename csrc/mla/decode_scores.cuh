// Scores of a page and their weights: one warpgroup, 64 rows.
#pragma once

#include "hopper/fragment.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/decode_params.h"
#include "mla/decode_storage.cuh"
#include "mla/softmax.cuh"

namespace dsv3rt {

constexpr int kScoresBarrier = 1;  // named
constexpr int kPeakSlack = 8;  // so that few pages make the output's warps rescale what they have

using Scores = float[kPageTokens / 2];
template <class Storage>
using Queries = uint32_t[Storage::kQueryRegisterSteps][4];  // fragments of 16 columns

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

template <class Storage>
__device__ __forceinline__ void load_queries(Storage& storage, PageRing ring, TwoStage rope,
                                             Queries<Storage>& queries) {
  constexpr int kSteps = Storage::kQueryRegisterSteps;
  const auto slab_at = [&](int slab) -> PageSlab& {
    return storage.latent.chunk(slab / kChunkSlabs, ring, rope)[slab % kChunkSlabs];
  };
#pragma unroll
  for (int chunk = 0; chunk < kLatentChunks; ++chunk) storage.wait_for_chunk(chunk, ring, rope);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load_matrices(queries[step], fragment_address(slab_at(step / 4), step % 4));
  storage.rope_full[rope.stage()].wait(rope.full_parity());
  named_barrier_sync(kScoresBarrier, 128);  // no warp multiplies by the queries before any more
  if constexpr (Storage::kQueryRestSteps > 0) {
    uint32_t words[4];
    load_matrices(words, fragment_address(slab_at(kSteps / 4), kSteps % 4));
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
    store_matrices(smem_address(storage.query_step) + row * 32 + (half ^ row / 4 % 2) * 16, words);
  }
#pragma unroll
  for (int slab = 0; slab < Storage::kQuerySlabs - 1; ++slab) {
    copy_slab(storage.queries[slab], slab_at(kLatentSlabs - Storage::kQuerySlabs + 1 + slab));
  }
  copy_slab(storage.queries[Storage::kQuerySlabs - 1], storage.rope[rope.stage()]);
  fence_async_proxy();
  named_barrier_sync(kScoresBarrier, 128);
}

template <class Storage>
__device__ __forceinline__ void start_latent_scores(Storage& storage, PageRing ring, TwoStage rope,
                                                    const Queries<Storage>& queries, Scores& scores) {
  constexpr int kRegisterSteps = Storage::kQueryRegisterSteps, kChunkSteps = kChunkSlabs * 4;
  constexpr int kFirstSharedSlab = kLatentSlabs - (Storage::kQuerySlabs - 1);
  const uint64_t shared_step = k_major_swizzle32_descriptor(storage.query_step);
  const uint64_t shared_slab = k_major_swizzle128_descriptor(storage.queries[0]);
  pin_registers(scores);
#pragma unroll
  for (int chunk = 0; chunk < kLatentChunks; ++chunk) {
    storage.wait_for_chunk(chunk, ring, rope);
    if constexpr (Storage::kPagesByThreads) fence_async_proxy();
    wgmma_fence();
#pragma unroll
    for (int step = chunk * kChunkSteps; step < (chunk + 1) * kChunkSteps; ++step) {
      const int slab = step / 4;
      const uint64_t columns = storage.latent.keys(slab, ring, rope) + step % 4 * 2;
      if (step < kRegisterSteps) {
        WgmmaBF16<kPageTokens, Major::kK>::multiply(scores, queries[step], columns, step != 0);
      } else {
        const uint64_t of_slab = shared_slab + (slab - kFirstSharedSlab) * (sizeof(PageSlab) >> 4) + step % 4 * 2;
        const uint64_t shared = slab < kFirstSharedSlab ? shared_step : of_slab;
        WgmmaBF16<kPageTokens, Major::kK>::multiply(scores, shared, columns, true);
      }
    }
    wgmma_commit();
  }
  pin_registers(scores);
}

template <class Storage>
__device__ __forceinline__ void start_rope_scores(Storage& storage, TwoStage rope, Scores& scores) {
  const uint64_t keys = k_major_swizzle128_descriptor(storage.rope[rope.stage()]);
  const uint64_t shared_queries = k_major_swizzle128_descriptor(storage.queries[Storage::kQuerySlabs - 1]);
  storage.rope_full[rope.stage()].wait(rope.full_parity());
  if constexpr (Storage::kPagesByThreads) fence_async_proxy();
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
template <class Storage>
__device__ __forceinline__ void clear_values(Storage& storage, PageRing ring, TwoStage rope, int first_row) {
  constexpr int kWords = 128 / 16;
#pragma unroll 1
  for (int word = first_row * kWords + threadIdx.x % 128; word < kPageTokens * kWords; word += 128) {
#pragma unroll
    for (int slab = 0; slab < kLatentSlabs; ++slab) {
      PageSlab* const chunk = storage.latent.chunk(slab / kChunkSlabs, ring, rope);
      reinterpret_cast<uint4*>(chunk[slab % kChunkSlabs])[word] = make_uint4(0, 0, 0, 0);
    }
  }
}

template <class Storage>
__device__ __forceinline__ void mask_page(Storage& storage, const MlaDecodeParams& params, const Piece& piece, int page,
                                          PageRing ring, TwoStage rope, Scores& scores) {
  const int thread = thread_idx_read_here();
  const int first_column = page * kPageTokens + thread % 4 * 2, end = piece.length - page * kPageTokens;
  const int first_row = blockIdx.x * kDecodeRows + decode_row(thread);
  const int seen[2] = {tokens_seen(params, piece.length, first_row) - first_column,
                       tokens_seen(params, piece.length, first_row + 8) - first_column};
  mask_scores<kPageTokens>(scores, seen);
  if (end < kPageTokens) clear_values(storage, ring, rope, end);
}

template <class Storage>
__device__ __forceinline__ void store_weights(Storage& storage, int rope_stage, const Scores& scores,
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

template <class Storage>
__device__ __forceinline__ void finish_scores(Storage& storage, const MlaDecodeParams& params, const Piece& piece,
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

template <class Storage>
__device__ __forceinline__ void consumer_score_pieces(Storage& storage, const MlaDecodeParams& params) {
  // Leaders of quads write for others, and speak for what they wrote.
  const bool arrives = kAllLanesArrive || threadIdx.x % 4 == 0;
  TwoStage slot, rope;
  PageRing ring;
  Queries<Storage> queries;
  Scores scores;
  while (true) {
    storage.piece_full[slot.stage()].wait(slot.full_parity());
    const Piece& piece = storage.piece[slot.stage()];
    if (piece.first_page == piece.end_page) return;
    load_queries(storage, ring, rope, queries);
    if (arrives) storage.weights_full[ring.stage].arrive();
    ring.advance();
    ++rope.count;
    SoftmaxState state;
#pragma unroll 1
    for (int page = piece.first_page; page < piece.end_page; ++page) {
      start_latent_scores(storage, ring, rope, queries, scores);
      wgmma_wait<1>();
      // Weights of the page before are held back until here, so that their product fills the time in which the next
      // scores become weights.
      if (page != piece.first_page && arrives) storage.weights_full[ring.stage_before()].arrive();
      start_rope_scores(storage, rope, scores);
      wgmma_wait<0>();
      pin_registers(scores);
      if (page >= piece.whole_pages) mask_page(storage, params, piece, page, ring, rope, scores);
      take_block<kPageTokens, kPeakSlack>(state, scores, params.scale_log2);
      named_barrier_sync(kScoresBarrier, 128);  // all warps have read the rope keys
      store_weights(storage, rope.stage(), scores, state);
      ring.advance();
      ++rope.count;
    }
    if (arrives) storage.weights_full[ring.stage_before()].arrive();
    storage.inverse_empty.wait(slot.count & 1 ^ 1);
    finish_scores(storage, params, piece, state);
    if (arrives) storage.inverse_full.arrive();
    storage.piece_empty[slot.stage()].arrive();
    ++slot.count;
  }
}

}  // namespace dsv3rt
