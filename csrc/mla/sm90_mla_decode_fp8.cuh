// Latent attention over a paged FP8 cache, bound by the cache's bytes: a block has 16 rows, queries x heads of one
// request at a time, and reads pages as they are. E4M3 numbers become F16 in registers, which is exact; their scales
// meet scores and weights instead of them. Each of four warps has one tile of 128 columns, of scores as of the output,
// and 16 of a page's tokens, whose scores it adds up and turns into weights. What one block waits for, the other block
// of the SM fills.
#pragma once

#include "hopper/tma.cuh"
#include "mla/decode_fp8_scores.cuh"

namespace dsv3rt {

// ---- Loading

__device__ __forceinline__ void producer_load_fp8_pieces(DecodeFp8Storage& storage, const MlaDecodeParams& params) {
  PieceCursor cursor(params, blockIdx.y);
  TwoStage slot;
  Fp8Ring ring;
  while (true) {
    const Piece piece = cursor.next();
    const int num_pages = piece.end_page - piece.first_page;
    if (threadIdx.x % 32 == 0) {
      storage.piece_empty[slot.stage()].wait(slot.empty_parity());
      storage.piece[slot.stage()] = piece;
      storage.piece_full[slot.stage()].arrive();
      const int32_t* pages = params.block_table + piece.request * params.block_table_stride + piece.first_page;
      int upcoming = num_pages > 0 ? *pages : 0;
#pragma unroll 1
      for (int left = num_pages; left > 0; --left) {
        const auto* source = static_cast<const uint8_t*>(params.cache) + int64_t(upcoming) * kFp8PageBytes;
        if (left > 1) upcoming = *++pages;
        storage.page_empty[ring.stage].wait(ring.parity ^ 1);
        storage.page_full[ring.stage].arrive_and_expect(kFp8PageBytes);
        bulk_load(storage.page[ring.stage], source, kFp8PageBytes, storage.page_full[ring.stage], L2Hint::kEvictFirst);
        ring.advance();
      }
    }
    __syncwarp();
    if (num_pages == 0) return;
    ++slot.count;
  }
}

// ---- Weights, of this warp's 16 tokens

using Fp8TokenScores = float[2][4];

__device__ __forceinline__ void trade_scores(const Fp8Consumer& self, const Fp8Scores& scores, Fp8TokenScores& whole) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
    const float (&own)[4] = scores[octet];
    self.storage.scores[self.warp][octet][lane] = make_float4(own[0], own[1], own[2], own[3]);
  }
  self.sync();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float4 parts[kFp8Warps];
#pragma unroll
    for (int warp = 0; warp < kFp8Warps; ++warp) parts[warp] = self.storage.scores[warp][self.warp * 2 + i][lane];
    whole[i][0] = (parts[0].x + parts[1].x) + (parts[2].x + parts[3].x);
    whole[i][1] = (parts[0].y + parts[1].y) + (parts[2].y + parts[3].y);
    whole[i][2] = (parts[0].z + parts[1].z) + (parts[2].z + parts[3].z);
    whole[i][3] = (parts[0].w + parts[1].w) + (parts[2].w + parts[3].w);
  }
}

__device__ __forceinline__ void hide_unseen(const Fp8Consumer& self, const Piece& piece, int page,
                                            Fp8TokenScores& scores) {
  const int first = page * kPageTokens + self.warp * 16 + self.quad * 2;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int seen = tokens_seen(self.params, piece.length, self.request_row(self.row + lower * 8)) - first;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i / 2 * 8 + i % 2 >= seen) scores[i / 2][lower * 2 + i % 2] = -INFINITY;
    }
  }
}

// Of a lane's two rows. What is subtracted from scaled scores is a whole number, so that earlier sums are rescaled
// exactly; it is the same in all warps.
struct Fp8Softmax {
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // over this lane's tokens
};

struct Fp8Weights {
  uint32_t words[kFp8Warps][4];  // of 16 tokens each, as an operand
  float rescale[2];  // what sums over earlier pages must be multiplied by
};

__device__ __forceinline__ float offset_of(float reference) { return reference == -INFINITY ? 0 : reference; }

// Each warp subtracts what suits its own tokens; where these numbers differ, the weights are brought to the largest.
__device__ __forceinline__ void trade_weights(const Fp8Consumer& self, const Fp8Queries& queries,
                                              const Fp8TokenScores& scores, Fp8Softmax& state, Fp8Weights& weights) {
  const int lane = threadIdx.x % 32;
  uint32_t own[4];
  float sum[2];
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const float scale_log2 = queries.scale_log2[lower];
    const float highest = max_over_quad(fmaxf(fmaxf(scores[0][lower * 2], scores[0][lower * 2 + 1]),
                                              fmaxf(scores[1][lower * 2], scores[1][lower * 2 + 1])));
    const float reference = fmaxf(state.reference[lower], ceilf(highest * scale_log2));
    const float offset = kTopExponent - offset_of(reference);
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[i] = exp2_approx(fmaf(scores[i / 2][lower * 2 + i % 2], scale_log2, offset));
    sum[lower] = (weight[0] + weight[1]) + (weight[2] + weight[3]);
    own[lower] = pack_half(weight[0], weight[1]);
    own[lower + 2] = pack_half(weight[2], weight[3]);
    if (self.quad == 0) self.storage.reference[self.row + lower * 8][self.warp] = reference;
  }
  self.storage.weights[self.warp][lane] = make_uint4(own[0], own[1], own[2], own[3]);
  self.sync();
#pragma unroll
  for (int warp = 0; warp < kFp8Warps; ++warp) {
    const uint4 words = self.storage.weights[warp][lane];
    weights.words[warp][0] = words.x;
    weights.words[warp][1] = words.y;
    weights.words[warp][2] = words.z;
    weights.words[warp][3] = words.w;
  }
  float4 references[2];
  bool equal = true;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    references[lower] = reinterpret_cast<const float4&>(self.storage.reference[self.row + lower * 8]);
    const float4& r = references[lower];
    equal = equal && r.x == state.reference[lower] && r.y == r.x && r.z == r.x && r.w == r.x;
  }
  weights.rescale[0] = weights.rescale[1] = 1;
  if (!__all_sync(~0u, equal)) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const float reference = largest_of(references[lower]), offset = offset_of(reference);
      const float of_warp[kFp8Warps] = {references[lower].x, references[lower].y, references[lower].z,
                                        references[lower].w};
#pragma unroll
      for (int warp = 0; warp < kFp8Warps; ++warp) {
        const float factor = exp2_approx(of_warp[warp] - offset);
        if (warp == self.warp) sum[lower] *= factor;
        const uint32_t factors = pack_half(factor, factor);
        weights.words[warp][lower] = multiply_half(weights.words[warp][lower], factors);
        weights.words[warp][lower + 2] = multiply_half(weights.words[warp][lower + 2], factors);
      }
      weights.rescale[lower] = exp2_approx(state.reference[lower] - offset);
      state.sum[lower] *= weights.rescale[lower];
      state.reference[lower] = reference;
    }
  }
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) state.sum[lower] += sum[lower];
}

// ---- Output

__device__ __forceinline__ void rescale_out(Fp8Out& out, const Fp8Weights& weights, float grown) {
  const float factors[2] = {weights.rescale[0] * grown, weights.rescale[1] * grown};
  if (!__any_sync(~0u, factors[0] != 1 || factors[1] != 1)) return;
#pragma unroll
  for (float (&sums)[4] : out.sums) scale_rows(sums, factors);
}

__device__ __forceinline__ void add_values(const Fp8Consumer& self, Fp8Weights& weights, const Fp8Scales& scales,
                                           Fp8Out& out) {
  const int lane = threadIdx.x % 32;
  const uint32_t values = smem_address(self.token(lane / 8 % 2 * 8 + lane % 8)) + self.warp * kFp8Tile + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < kPageTokens / 16; ++step) {
    uint32_t (&operand)[4] = weights.words[step];
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[i] = multiply_half(operand[i], scales.pairs[step * 2 + i / 2]);
#pragma unroll
    for (int columns = 0; columns < kFp8Tile; columns += 32) {
      uint32_t words[4];  // a pair of columns of two tokens each; of tokens 0 .. 8 and 8 .. 16, then 16 columns further
      load_matrices_transposed(words, values + step * 16 * kFp8TokenBytes + columns);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const HalfPairs first = widen_e4m3(__byte_perm(words[i * 2], 0, 0x3120));
        const HalfPairs second = widen_e4m3(__byte_perm(words[i * 2 + 1], 0, 0x3120));
        mma_f16(out.sums[columns / 8 + i * 2], operand, first.lower, second.lower);
        mma_f16(out.sums[columns / 8 + i * 2 + 1], operand, first.upper, second.upper);
      }
    }
  }
}

// Slots past the end hold anything. Their weights are zero, but zero times NaN is not. Each warp clears what it reads.
__device__ __forceinline__ void clear_slots(const Fp8Consumer& self, int first) {
  for (int token = first + self.row; token < kPageTokens; token += 8) {
    uint8_t* const slot = self.token(token);
    auto* const latent = reinterpret_cast<uint4*>(slot + self.warp * kFp8Tile);
    latent[self.quad] = latent[self.quad + 4] = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint2*>(slot + kFp8RopeOffset + self.warp * kFp8RopeColumns * 2)[self.quad] = make_uint2(0, 0);
    if (self.quad == 0) reinterpret_cast<float*>(slot + kLatentDim)[self.warp] = 0;
  }
  self.sync();
}

__device__ __forceinline__ int64_t fp8_partial_row(const MlaDecodeParams& params, int partial) {
  const int64_t part = int64_t(blockIdx.x) * params.grid.parts + blockIdx.y;
  return (part * kPartialsAPart + partial) * kFp8Rows;
}

__device__ __forceinline__ void store_fp8_piece(const Fp8Consumer& self, const Piece& piece, const Fp8Softmax& state,
                                                const Fp8Out& out) {
  constexpr float kLn2 = 0.693147180559945309f;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const float sum = sum_over_quad(state.sum[lower]);
    if (self.quad == 0) self.storage.sum[self.row + lower * 8][self.warp] = sum;
  }
  self.sync();
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = self.row + lower * 8, request_row = self.request_row(row);
    if (request_row >= self.num_rows()) continue;
    const float4 sums = reinterpret_cast<const float4&>(self.storage.sum[row]);
    const float sum = (sums.x + sums.y) + (sums.z + sums.w);
    const int64_t out_row = int64_t(piece.request) * self.num_rows() + request_row;
    const int64_t partial_row = fp8_partial_row(self.params, piece.partial) + row;
    if (self.warp == 0 && self.quad == 0) {
      const float lse = offset_of(state.reference[lower]) - kTopExponent + log2f(sum);
      if (piece.partial < 0) {
        self.params.lse[out_row] = lse * kLn2;
      } else {
        self.params.partial_lse[partial_row] = lse;
      }
    }
    const float factor = sum == 0 ? 0 : power_of_two(out.exponent - kTopExponent) / sum;
#pragma unroll
    for (int i = 0; i < kFp8Tile / 16; ++i) {
      const int column = self.warp * kFp8Tile + i * 16 + self.quad * 4;
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = out.sums[i * 2 + j % 2][lower * 2 + j / 2] * factor;
      if (piece.partial < 0) {
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(self.params.out) + out_row * kLatentDim + column) =
            make_uint2(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]));
      } else {
        *reinterpret_cast<float4*>(self.params.partial_out + partial_row * kLatentDim + column) =
            make_float4(values[0], values[1], values[2], values[3]);
      }
    }
  }
}

__device__ __forceinline__ void consumer_attend_fp8_pieces(DecodeFp8Storage& storage, const MlaDecodeParams& params,
                                                           int warp) {
  const int lane = threadIdx.x % 32;
  Fp8Consumer self{storage, params, warp, lane / 4, lane % 4};
  while (true) {
    storage.piece_full[self.slot.stage()].wait(self.slot.full_parity());
    const Piece& piece = storage.piece[self.slot.stage()];
    if (piece.first_page == piece.end_page) return;
    Fp8Queries queries;
    load_fp8_queries(self, piece, queries);
    Fp8Softmax state;
    Fp8Out out;
#pragma unroll 1
    for (int page = piece.first_page; page < piece.end_page; ++page) {
      storage.page_full[self.ring.stage].wait(self.ring.parity);
      if (const int end = piece.length - page * kPageTokens; end < kPageTokens) clear_slots(self, end);
      Fp8Scores scores;
      Fp8Scales scales;
      multiply_keys(self, queries, scores);
      take_scales(self, scores, out, scales);
      multiply_rope_keys(self, queries, scores);
      Fp8TokenScores whole;
      trade_scores(self, scores, whole);
      if (page >= piece.whole_pages) hide_unseen(self, piece, page, whole);
      Fp8Weights weights;
      trade_weights(self, queries, whole, state, weights);
      rescale_out(out, weights, scales.grown);
      add_values(self, weights, scales, out);
      fence_async_proxy();  // the copy engine, another proxy, overwrites what has been read here
      storage.page_empty[self.ring.stage].arrive();
      self.ring.advance();
    }
    store_fp8_piece(self, piece, state, out);
    storage.piece_empty[self.slot.stage()].arrive();
    ++self.slot.count;
  }
}

__global__ void __launch_bounds__(kFp8Threads, kFp8Blocks)
    sm90_mla_decode_fp8_kernel(const __grid_constant__ MlaDecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<DecodeFp8Storage*>(shared_bytes);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kFp8Stages; ++stage) {
      storage.page_full[stage].init(1);
      storage.page_empty[stage].init(32 * kFp8Warps);
    }
    for (int slot = 0; slot < kTileSlots; ++slot) {
      storage.piece_full[slot].init(1);
      storage.piece_empty[slot].init(32 * kFp8Warps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp >= kFp8Warps) {
    release_registers<40>();
    if (warp == kFp8Warps) producer_load_fp8_pieces(storage, params);
  } else {
    claim_registers<216>();
    consumer_attend_fp8_pieces(storage, params, warp);
  }
}

}  // namespace dsv3rt
