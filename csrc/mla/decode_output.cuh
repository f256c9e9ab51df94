// Sums of the values of pages by their weights: two warpgroups, each with one chunk of the columns.
#pragma once

#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/decode_params.h"
#include "mla/decode_scores.cuh"
#include "mla/decode_storage.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

constexpr int kOutColumns = kLatentDim / kLatentChunks;

// Of one instruction: a wider one wants more registers than the compiler grants a block of 512 threads.
constexpr int kProductColumns = 128;
using Out = float[kOutColumns / kProductColumns][kProductColumns / 2];

template <class Storage>
__device__ __forceinline__ void add_page(Storage& storage, PageRing ring, TwoStage rope, int half, Out& out) {
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
  const uint64_t values = mn_major_swizzle128_descriptor(storage.latent.chunk(half, ring, rope), sizeof(PageSlab));
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

template <class Storage>
__device__ __forceinline__ void consumer_add_pieces(Storage& storage, const MlaDecodeParams& params, int half) {
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

}  // namespace dsv3rt
