// Latent attention over a paged FP8 cache, bound by the cache's bytes: a block has 16 rows, queries x heads of one
// request at a time, and reads pages as they are. E4M3 numbers become F16 in registers, which is exact; their scales
// meet scores and weights instead of them. Eight warps first share a page's tokens (and the columns of scores), then
// the output's columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "hopper/fragment.cuh"
#include "hopper/mma.cuh"
#include "hopper/tma.cuh"
#include "mla/decode_fp8_storage.cuh"
#include "mla/softmax.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

constexpr int kFp8Barrier = 1;           // named, of the warps that multiply
constexpr int kFp8Steps = 16;            // of 16 latent columns, of half a score
constexpr int kFp8RopeSteps = 2;         // likewise
constexpr float kWeightTop = 16384;      // weights times scales are at most this: F16 ends at 65504
constexpr float kLeastScale = 0x1p-110f;

__device__ __forceinline__ void sync_fp8_warps() { named_barrier_sync(kFp8Barrier, 32 * kFp8Warps); }

// Two E4M3 numbers as F16, exactly.
__device__ __forceinline__ uint32_t half_pair(uint32_t two_bytes) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two_bytes), __NV_E4M3);
  return uint32_t(pair.x) | uint32_t(pair.y) << 16;
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float largest_over_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
  return x;
}

__device__ __forceinline__ float total_over_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

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
        bulk_load(storage.page[ring.stage], source, kFp8PageBytes, storage.page_full[ring.stage]);
        ring.advance();
      }
    }
    __syncwarp();
    if (num_pages == 0) return;
    ++slot.count;
  }
}

// What a warp knows throughout. Its lanes hold rows `row` and `row + 8`.
struct Fp8Consumer {
  DecodeFp8Storage& storage;
  const MlaDecodeParams& params;
  int warp;
  int row, quad;  // lane / 4, lane % 4
  TwoStage slot;
  Fp8Ring ring;

  __device__ __forceinline__ int tokens() const { return warp % 4 * 16; }  // the first of its 16
  __device__ __forceinline__ int half() const { return warp / 4; }         // of the columns of scores
  __device__ __forceinline__ const uint8_t* token(int index) const {
    return storage.page[ring.stage] + index * kFp8TokenBytes;
  }
  __device__ __forceinline__ int num_rows() const { return params.num_queries * params.num_heads; }
  __device__ __forceinline__ int request_row(int block_row) const { return blockIdx.x * kFp8Rows + block_row; }
};

struct Fp8Queries {
  uint32_t latent[kFp8Steps][4];  // F16, each row times a power of two
  uint32_t rope[kFp8RopeSteps][4];
  float inverse[2];               // of that power
};

// The order of columns in a product is free. A lane takes 16 that follow each other for four steps, and so 16 bytes of
// the cache.
__device__ __forceinline__ void load_fp8_queries(const Fp8Consumer& self, const Piece& piece, Fp8Queries& queries) {
  float largest[2] = {};
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int request_row = self.request_row(self.row + lower * 8);
    const bool valid = request_row < self.num_rows();
    const int64_t row = int64_t(piece.request) * self.num_rows() + (valid ? request_row : 0);
    const auto* source = static_cast<const __nv_bfloat16*>(self.params.q) + row * kCachedDim;
#pragma unroll
    for (int group = 0; group < kFp8Steps / 4; ++group) {
      const int column = self.half() * 256 + group * 64 + self.quad * 16;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const uint4 words = valid ? *reinterpret_cast<const uint4*>(source + column + eight * 8) : uint4{};
        queries.latent[group * 4 + eight * 2][lower] = words.x;
        queries.latent[group * 4 + eight * 2][lower + 2] = words.y;
        queries.latent[group * 4 + eight * 2 + 1][lower] = words.z;
        queries.latent[group * 4 + eight * 2 + 1][lower + 2] = words.w;
      }
    }
#pragma unroll
    for (int step = 0; step < kFp8RopeSteps; ++step) {
      const int column = kLatentDim + (self.half() * kFp8RopeSteps + step) * 16 + self.quad * 4;
      const uint2 words = valid ? *reinterpret_cast<const uint2*>(source + column) : uint2{};
      queries.rope[step][lower] = words.x;
      queries.rope[step][lower + 2] = words.y;
    }
#pragma unroll
    for (int step = 0; step < kFp8Steps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        const uint32_t words = queries.latent[step][lower + pair];
        largest[lower] = fmaxf(largest[lower], fmaxf(fabsf(low_bf16(words)), fabsf(high_bf16(words))));
      }
    }
    largest[lower] = max_over_quad(largest[lower]);
    if (self.warp % 4 == 0 && self.quad == 0) self.storage.largest[self.half()][self.row + lower * 8] = largest[lower];
  }
  sync_fp8_warps();
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = self.row + lower * 8;
    const float of_row = fmaxf(self.storage.largest[0][row], self.storage.largest[1][row]);
    // The power of two that takes the largest to 2^13 .. 2^14, by its exponent.
    const int exponent = min(127 + 13 + 127 - (__float_as_int(of_row) >> 23), 253);
    const float factor = __int_as_float(exponent << 23);
    queries.inverse[lower] = __int_as_float((254 - exponent) << 23);
#pragma unroll
    for (int step = 0; step < kFp8Steps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        uint32_t& words = queries.latent[step][lower + pair];
        words = pack_half(low_bf16(words) * factor, high_bf16(words) * factor);
      }
    }
  }
}

// Half a sum of 16 rows x 16 tokens.
__device__ __forceinline__ void score_tokens(const Fp8Consumer& self, const Fp8Queries& queries) {
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    const int first = self.tokens() + eight * 8;
    const uint8_t* key = self.token(first + self.row);
    float sums[2][4] = {}, rope[4] = {};  // each of 128 columns, with a scale of its own
#pragma unroll
    for (int group = 0; group < kFp8Steps / 4; ++group) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(key + self.half() * 256 + group * 64 + self.quad * 16);
      const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        mma_f16(sums[group / 2], queries.latent[group * 4 + step], half_pair(words[step] & 0xffff),
                half_pair(words[step] >> 16));
      }
    }
#pragma unroll
    for (int step = 0; step < kFp8RopeSteps; ++step) {
      const int column = (self.half() * kFp8RopeSteps + step) * 16 + self.quad * 4;
      const uint2 words = *reinterpret_cast<const uint2*>(key + kFp8RopeOffset + column * 2);
      mma_bf16(rope, queries.rope[step], words.x, words.y);
    }
    const int token = first + self.quad * 2;
    float2 scales[2];  // of a token's two tiles
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scales[i] = *reinterpret_cast<const float2*>(self.token(token + i) + kLatentDim + self.half() * 8);
    }
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      float score[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float latent = fmaf(scales[i].x, sums[0][lower * 2 + i], scales[i].y * sums[1][lower * 2 + i]);
        score[i] = fmaf(latent, queries.inverse[lower], rope[lower * 2 + i]);
      }
      *reinterpret_cast<float2*>(&self.storage.scores[self.half()][self.row + lower * 8][token]) =
          make_float2(score[0], score[1]);
    }
  }
}

// Of a warp's two rows; every lane has two of a page's tokens.
struct Fp8Softmax {
  float peak[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
};

__device__ __forceinline__ void weigh_tokens(const Fp8Consumer& self, const Piece& piece, int page, Fp8Softmax& state) {
  const int lane = threadIdx.x % 32;
  const float scale_log2 = self.params.scale_log2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = self.warp * 2 + i;
    float score[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int token = lane + k * 32;
      score[k] = self.storage.scores[0][row][token] + self.storage.scores[1][row][token];
      if (page >= piece.whole_pages) {
        const int seen = tokens_seen(self.params, piece.length, self.request_row(row));
        if (page * kPageTokens + token >= seen) score[k] = -INFINITY;
      }
    }
    const float peak = fmaxf(state.peak[i], largest_over_warp(fmaxf(score[0], score[1])));
    const float offset = offset_of(peak, scale_log2);
    const float rescale = exp2_approx(__fmul_rn(state.peak[i], scale_log2) - offset);
    state.peak[i] = peak;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float weight = exp2_approx(fmaf(score[k], scale_log2, -offset));
      self.storage.weights[row][lane + k * 32] = weight;
      sum += weight;
    }
    state.sum[i] = fmaf(state.sum[i], rescale, sum);
    if (lane == 0) self.storage.rescale[row] = rescale;
  }
}

// 64 columns of the output: sums[j] holds, of its two rows, columns 8 n + j for n = 2 quad and the next. They stand for
// themselves times `scale` / kWeightTop, the largest scale so far.
struct Fp8Out {
  float sums[8][4] = {};
  float scale = kLeastScale;
};

__device__ __forceinline__ void add_tokens(const Fp8Consumer& self, Fp8Out& out) {
  const int tile = self.warp / 2, lane = threadIdx.x % 32;
  const auto scale_of = [&](int token) { return reinterpret_cast<const float*>(self.token(token) + kLatentDim)[tile]; };
  const float largest = fmaxf(out.scale, largest_over_warp(fmaxf(scale_of(lane), scale_of(lane + 32))));
  const float grown = out.scale / largest, factor = kWeightTop / largest;
  out.scale = largest;
  const float rescale[2] = {self.storage.rescale[self.row] * grown, self.storage.rescale[self.row + 8] * grown};
#pragma unroll
  for (float (&sums)[4] : out.sums) scale_rows(sums, rescale);
#pragma unroll
  for (int step = 0; step < kPageTokens / 16; ++step) {
    const int first = step * 16 + self.quad * 4;  // the order of tokens is free as well
    uint2 bytes[4];
    float scales[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bytes[i] = *reinterpret_cast<const uint2*>(self.token(first + i) + self.warp * 64 + self.row * 8);
      scales[i] = scale_of(first + i) * factor;
    }
    uint32_t weights[4];
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const float4 w = *reinterpret_cast<const float4*>(&self.storage.weights[self.row + lower * 8][first]);
      weights[lower] = pack_half(w.x * scales[0], w.y * scales[1]);
      weights[lower + 2] = pack_half(w.z * scales[2], w.w * scales[3]);
    }
#pragma unroll
    for (int four = 0; four < 2; ++four) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = four == 0 ? bytes[i].x : bytes[i].y;
#pragma unroll
      for (int two = 0; two < 2; ++two) {
        const int order = two == 0 ? 0x5140 : 0x7362;  // bytes 0 and 1, or 2 and 3, of two tokens in turns
        const uint32_t upper = __byte_perm(words[0], words[1], order), lower = __byte_perm(words[2], words[3], order);
        float (&even)[4] = out.sums[four * 4 + two * 2];
        float (&odd)[4] = out.sums[four * 4 + two * 2 + 1];
        mma_f16(even, weights, half_pair(upper & 0xffff), half_pair(lower & 0xffff));
        mma_f16(odd, weights, half_pair(upper >> 16), half_pair(lower >> 16));
      }
    }
  }
}

// Slots past the end hold anything. Their weights are zero, but zero times NaN is not.
__device__ __forceinline__ void clear_slots(const Fp8Consumer& self, int first) {
  auto* chunks = reinterpret_cast<uint4*>(self.storage.page[self.ring.stage]);
  for (int i = first * (kFp8TokenBytes / 16) + threadIdx.x; i < kFp8PageBytes / 16; i += 32 * kFp8Warps) {
    chunks[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  sync_fp8_warps();
}

__device__ __forceinline__ int64_t fp8_partial_row(const MlaDecodeParams& params, int partial) {
  const int64_t part = int64_t(blockIdx.x) * params.grid.parts + blockIdx.y;
  return (part * kPartialsAPart + partial) * kFp8Rows;
}

__device__ __forceinline__ void finish_weights(const Fp8Consumer& self, const Piece& piece, const Fp8Softmax& state) {
  constexpr float kLn2 = 0.693147180559945309f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = total_over_warp(state.sum[i]);
    const int row = self.warp * 2 + i, request_row = self.request_row(row);
    if (threadIdx.x % 32 != 0) continue;
    self.storage.inverse[row] = sum == 0 ? 0 : 1 / sum;
    const float lse = offset_of(state.peak[i], self.params.scale_log2) + log2f(sum);
    if (request_row >= self.num_rows()) continue;
    if (piece.partial < 0) {
      self.params.lse[int64_t(piece.request) * self.num_rows() + request_row] = lse * kLn2;
    } else {
      self.params.partial_lse[fp8_partial_row(self.params, piece.partial) + row] = lse;
    }
  }
  sync_fp8_warps();
}

__device__ __forceinline__ void store_fp8_out(const Fp8Consumer& self, const Piece& piece, const Fp8Out& out) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = self.row + lower * 8, request_row = self.request_row(row);
    if (request_row >= self.num_rows()) continue;
    const float factor = self.storage.inverse[row] * out.scale * (1 / kWeightTop);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = self.warp * 64 + self.quad * 16 + i * 8;
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = out.sums[j][lower * 2 + i] * factor;
      if (piece.partial < 0) {
        const int64_t target = (int64_t(piece.request) * self.num_rows() + request_row) * kLatentDim + column;
        store_octet(self.params.out, target, values);
      } else {
        const int64_t target = (fp8_partial_row(self.params, piece.partial) + row) * kLatentDim + column;
        auto* quads = reinterpret_cast<float4*>(self.params.partial_out + target);
        quads[0] = make_float4(values[0], values[1], values[2], values[3]);
        quads[1] = make_float4(values[4], values[5], values[6], values[7]);
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
      score_tokens(self, queries);
      sync_fp8_warps();
      weigh_tokens(self, piece, page, state);
      sync_fp8_warps();
      add_tokens(self, out);
      __syncwarp();
      if (lane == 0) storage.page_empty[self.ring.stage].arrive();
      self.ring.advance();
    }
    finish_weights(self, piece, state);
    store_fp8_out(self, piece, out);
    __syncwarp();
    if (lane == 0) storage.piece_empty[self.slot.stage()].arrive();
    ++self.slot.count;
  }
}

__global__ void __launch_bounds__(kFp8Threads, 1)
    sm90_mla_decode_fp8_kernel(const __grid_constant__ MlaDecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<DecodeFp8Storage*>(shared_bytes);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kFp8Stages; ++stage) {
      storage.page_full[stage].init(1);
      storage.page_empty[stage].init(kFp8Warps);
    }
    for (int slot = 0; slot < kTileSlots; ++slot) {
      storage.piece_full[slot].init(1);
      storage.piece_empty[slot].init(kFp8Warps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp == kFp8Warps) {
    producer_load_fp8_pieces(storage, params);
  } else {
    consumer_attend_fp8_pieces(storage, params, warp);
  }
}

}  // namespace dsv3rt
