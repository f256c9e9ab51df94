// Latent attention over a paged FP8 cache, bound by the cache's bytes: a block has 16 rows, queries x heads of one
// request at a time, and reads pages as they are. E4M3 numbers become F16 in registers, which is exact; their scales
// meet scores and weights instead of them. Two groups of warps take pages in turns and join their sums when a piece
// ends. Each of a group's four warps has one tile of 128 columns, of scores as of the output; they trade their parts of
// the scores once a page.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper/convert.cuh"
#include "hopper/fragment.cuh"
#include "hopper/mma.cuh"
#include "hopper/shared.cuh"
#include "hopper/tma.cuh"
#include "mla/decode_fp8_loader.cuh"
#include "mla/decode_fp8_storage.cuh"
#include "mla/softmax.cuh"

namespace dsv3rt {

constexpr int kFp8GroupBarrier = 1, kFp8GroupThreads = 32 * kFp8Warps;  // the first; there is one for each group
constexpr int kFp8PairBarrier = kFp8GroupBarrier + kFp8Groups,
              kFp8PairThreads = 32 * kFp8Groups;  // of warps with one tile
constexpr int kFp8Tile = 128;  // columns with one scale
constexpr int kFp8Steps = kFp8Tile / 16;
constexpr int kFp8RopeColumns = 64 / kFp8Warps;  // of a warp
constexpr float kWeightTop = 16384;  // weights times scales are at most this: F16 ends at 65504
constexpr float kLeastScale = 0x1p-110f;

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float largest_of(uint32_t pair) {
  return fmaxf(fabsf(low_bf16(pair)), fabsf(high_bf16(pair)));
}

// ---- What a warp that multiplies knows throughout. Its lanes hold rows `row` and `row + 8`.

struct Fp8Consumer {
  DecodeFp8Storage& storage;
  const MlaDecodeParams& params;
  int group, warp;  // warp of the group
  int row, quad;  // lane / 4, lane % 4
  TwoStage slot;
  RingPosition<kFp8Stages / kFp8Groups> ring;  // of the group's pages
  int turn = 0;  // pages of the pieces before

  __device__ __forceinline__ int stage() const { return ring.stage * kFp8Groups + group; }
  __device__ __forceinline__ uint8_t* token(int index) const { return storage.page[stage()] + index * kFp8TokenBytes; }
  __device__ __forceinline__ int num_rows() const { return params.num_queries * params.num_heads; }
  __device__ __forceinline__ int request_row(int block_row) const { return blockIdx.x * kFp8Rows + block_row; }
  __device__ __forceinline__ void sync_group() const {
    GroupBarrier(kFp8GroupBarrier + group, kFp8GroupThreads).sync();
  }
  __device__ __forceinline__ void sync_pair() const { GroupBarrier(kFp8PairBarrier + warp, kFp8PairThreads).sync(); }
};

struct Fp8Queries {
  uint32_t latent[kFp8Steps][4];  // F16, each row times a power of two
  uint32_t rope[4];  // BF16, likewise
  float scale_log2[2];  // of scores, over that power
};

// The order of columns in a product is free: of 16 bytes of a key, a lane takes four that follow each other.
__device__ __forceinline__ void load_fp8_queries(const Fp8Consumer& self, const Piece& piece, Fp8Queries& queries) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int request_row = self.request_row(self.row + lower * 8);
    const bool valid = request_row < self.num_rows();
    const int64_t row = int64_t(piece.request) * self.num_rows() + (valid ? request_row : 0);
    const auto* source = static_cast<const __nv_bfloat16*>(self.params.q) + row * kCachedDim;
    float largest = 0;
#pragma unroll
    for (int step = 0; step < kFp8Steps; ++step) {
      const int column = self.warp * kFp8Tile + step * 16 + self.quad * 4;
      const uint2 words = valid ? *reinterpret_cast<const uint2*>(source + column) : uint2{};
      queries.latent[step][lower] = words.x;
      queries.latent[step][lower + 2] = words.y;
      largest = fmaxf(largest, fmaxf(largest_of(words.x), largest_of(words.y)));
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int column = kLatentDim + self.warp * kFp8RopeColumns + upper * 8 + self.quad * 2;
      const uint32_t words = valid ? *reinterpret_cast<const uint32_t*>(source + column) : 0;
      queries.rope[lower + upper * 2] = words;
      largest = fmaxf(largest, largest_of(words));
    }
    largest = max_over_quad(largest);
    if (self.quad == 0) self.storage.largest[self.group][self.warp][self.row + lower * 8] = largest;
  }
  self.sync_group();  // the next queries cannot come before a page's scores were traded
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    float largest = 0;
#pragma unroll
    for (const auto& of_warp : self.storage.largest[self.group])
      largest = fmaxf(largest, of_warp[self.row + lower * 8]);
    // The power of two that takes the largest to 2^13 .. 2^14, by its exponent.
    const int exponent = min(127 + 13 + 127 - (__float_as_int(largest) >> 23), 253);
    const float factor = __int_as_float(exponent << 23);
    queries.scale_log2[lower] = self.params.scale_log2 * __int_as_float((254 - exponent) << 23);
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
#pragma unroll
      for (uint32_t (&latent)[4] : queries.latent) {
        uint32_t& words = latent[lower + pair];
        words = pack_half(low_bf16(words) * factor, high_bf16(words) * factor);
      }
      uint32_t& words = queries.rope[lower + pair];
      words = pack_bf16(low_bf16(words) * factor, high_bf16(words) * factor);
    }
  }
}

// ---- Scores: [octet of tokens][as of an accumulator], and for each octet the scales of a lane's two tokens

using Fp8Scores = float[kFp8Octets][4];
using Fp8Scales = float[kFp8Octets][2];

// Of this warp's columns alone.
__device__ __forceinline__ void multiply_keys(const Fp8Consumer& self, const Fp8Queries& queries, Fp8Scores& scores,
                                              Fp8Scales& scales) {
  const int lane = threadIdx.x % 32;
  // This lane's row of the matrices: those of a step are 16 columns of eight tokens; rope keys fill two such, of 16.
  const uint32_t keys = smem_address(self.token(lane % 8)) + self.warp * kFp8Tile + lane / 8 * 16;
  const uint32_t rope_keys = smem_address(self.token(lane / 16 * 8 + lane % 8)) + kFp8RopeOffset +
                             self.warp * kFp8RopeColumns * 2 + lane / 8 % 2 * 16;
  const uint8_t* of_token = self.token(self.quad * 2) + kLatentDim + self.warp * 4;
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
    if (octet == kFp8Octets / 2) self.storage.page_full[self.stage()][1].wait(self.ring.parity);
    float (&sums)[4] = scores[octet];
#pragma unroll
    for (float& sum : sums) sum = 0;
#pragma unroll
    for (int step = 0; step < kFp8Steps; step += 4) {
      uint32_t words[4];
      load_matrices(words, keys + octet * 8 * kFp8TokenBytes + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const HalfPairs pairs = widen_e4m3(words[i]);
        mma_f16(sums, queries.latent[step + i], pairs.lower, pairs.upper);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scales[octet][i] = *reinterpret_cast<const float*>(of_token + (octet * 8 + i) * kFp8TokenBytes);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] *= scales[octet][i % 2];
    if (octet % 2 == 1) {
      uint32_t words[4];
      load_matrices(words, rope_keys + (octet - 1) * 8 * kFp8TokenBytes);
      mma_bf16(scores[octet - 1], queries.rope, words[0], words[1]);
      mma_bf16(scores[octet], queries.rope, words[2], words[3]);
    }
  }
}

// Every warp gets the same sums: two warps' are added first, the other two's, then these.
__device__ __forceinline__ void add_over_warps(const Fp8Consumer& self, Fp8Scores& scores) {
  const int lane = threadIdx.x % 32;
  auto& of_group = self.storage.scores[self.group];
  self.sync_group();  // what was traded before has been read
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
    const float (&own)[4] = scores[octet];
    of_group[self.warp][octet][lane] = make_float4(own[0], own[1], own[2], own[3]);
  }
  self.sync_group();
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
    const float4 a = of_group[self.warp ^ 1][octet][lane];
    const float4 b = of_group[self.warp ^ 2][octet][lane];
    const float4 c = of_group[self.warp ^ 3][octet][lane];
    float (&sums)[4] = scores[octet];
    sums[0] = (sums[0] + a.x) + (b.x + c.x);
    sums[1] = (sums[1] + a.y) + (b.y + c.y);
    sums[2] = (sums[2] + a.z) + (b.z + c.z);
    sums[3] = (sums[3] + a.w) + (b.w + c.w);
  }
}

// ---- Weights and output

// Of a lane's two rows, the same in every warp.
struct Fp8Softmax {
  float peak[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // over a lane's tokens
};

// 128 columns of the output: sums[2 i + j] holds, of its two rows, columns 16 i + 2 n + j for n = 2 quad and the next.
// They stand for themselves times kWeightTop / `scale`, the largest scale so far.
struct Fp8Out {
  float sums[kFp8Tile / 8][4] = {};
  float scale = kLeastScale;
};

// Scores become weights; what was summed before is rescaled.
__device__ __forceinline__ void weigh_tokens(const Fp8Queries& queries, Fp8Scores& scores, Fp8Softmax& state,
                                             float (&rescale)[2]) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    float peaks[2] = {state.peak[lower], -INFINITY};
#pragma unroll
    for (const auto& of_octet : scores) {
#pragma unroll
      for (int i = 0; i < 2; ++i) peaks[i] = fmaxf(peaks[i], of_octet[lower * 2 + i]);
    }
    const float peak = max_over_quad(fmaxf(peaks[0], peaks[1])), scale_log2 = queries.scale_log2[lower];
    const float offset = offset_of(peak, scale_log2);
    rescale[lower] = exp2_approx(__fmul_rn(state.peak[lower], scale_log2) - offset);
    state.peak[lower] = peak;
    float sums[2] = {};
#pragma unroll
    for (auto& of_octet : scores) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = of_octet[lower * 2 + i];
        score = exp2_approx(fmaf(score, scale_log2, -offset));
        sums[i] += score;
      }
    }
    state.sum[lower] = fmaf(state.sum[lower], rescale[lower], sums[0] + sums[1]);
  }
}

// Scales of the page meet the weights, in F16.
__device__ __forceinline__ void take_scales(Fp8Out& out, const Fp8Scores& weights, const Fp8Scales& scales,
                                            float (&rescale)[2], uint32_t (&packed)[kPageTokens / 16][4]) {
  float largest = out.scale;
#pragma unroll
  for (const auto& pair : scales) largest = fmaxf(largest, fmaxf(pair[0], pair[1]));
  largest = max_over_quad(largest);
  const float grown = out.scale / largest, factor = kWeightTop / largest;
  out.scale = largest;
#pragma unroll
  for (float& x : rescale) x *= grown;
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
    const float (&w)[4] = weights[octet];
    const float scaled[2] = {scales[octet][0] * factor, scales[octet][1] * factor};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      packed[octet / 2][octet % 2 * 2 + lower] = pack_half(w[lower * 2] * scaled[0], w[lower * 2 + 1] * scaled[1]);
    }
  }
}

__device__ __forceinline__ void add_values(const Fp8Consumer& self, const uint32_t (&weights)[kPageTokens / 16][4],
                                           Fp8Out& out) {
  const int lane = threadIdx.x % 32;
  const uint32_t values = smem_address(self.token(lane / 8 % 2 * 8 + lane % 8)) + self.warp * kFp8Tile + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < kPageTokens / 16; ++step) {
#pragma unroll
    for (int columns = 0; columns < kFp8Tile; columns += 32) {
      uint32_t words[4];  // a pair of columns of two tokens each; of tokens 0 .. 8 and 8 .. 16, then 16 columns further
      load_matrices_transposed(words, values + step * 16 * kFp8TokenBytes + columns);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const HalfPairs first = widen_e4m3(__byte_perm(words[i * 2], 0, 0x3120));
        const HalfPairs second = widen_e4m3(__byte_perm(words[i * 2 + 1], 0, 0x3120));
        mma_f16(out.sums[columns / 8 + i * 2], weights[step], first.lower, second.lower);
        mma_f16(out.sums[columns / 8 + i * 2 + 1], weights[step], first.upper, second.upper);
      }
    }
    if (step % 2 == 1) {
      fence_async_proxy();  // the copy engine, another proxy, overwrites what has been read here
      __syncwarp();
      self.storage.page_empty[self.stage()][step / 2].arrive_for_warp();
    }
  }
}

// Slots past the end hold anything. Their weights are zero, but zero times NaN is not. Each warp clears what it reads.
__device__ __forceinline__ void clear_slots(const Fp8Consumer& self, int first) {
  self.storage.page_full[self.stage()][1].wait(self.ring.parity);
  for (int token = first + self.row; token < kPageTokens; token += 8) {
    uint8_t* const slot = self.token(token);
    auto* const latent = reinterpret_cast<uint4*>(slot + self.warp * kFp8Tile);
    latent[self.quad] = latent[self.quad + 4] = make_uint4(0, 0, 0, 0);
    reinterpret_cast<uint2*>(slot + kFp8RopeOffset + self.warp * kFp8RopeColumns * 2)[self.quad] = make_uint2(0, 0);
    if (self.quad == 0) reinterpret_cast<float*>(slot + kLatentDim)[self.warp] = 0;
  }
  fence_async_proxy();
  __syncwarp();
}

__device__ __forceinline__ int64_t fp8_partial_row(const MlaDecodeParams& params, int partial) {
  const int64_t part = int64_t(blockIdx.x) * params.grid.parts + blockIdx.y;
  return (part * kPartialsAPart + partial) * kFp8Rows;
}

// Half a tile of the output of both groups together: [sums as Fp8Out's][as of an accumulator].
using Fp8JointOut = float[kFp8Tile / 16][4];

struct Fp8JointRows {
  float inverse[2];  // of the sum of weights
  float lse[2];  // base 2
};

// Warps with the same tile join what their groups have summed: group 0 keeps the first half of the columns, group 1 the
// second. Their rows' sums are those of both.
__device__ __forceinline__ void join_groups(const Fp8Consumer& self, const Fp8Queries& queries, Fp8Softmax& state,
                                            const Fp8Out& out, Fp8JointOut& joint, Fp8JointRows& rows) {
  constexpr int kKept = kFp8Tile / 16;
  const int lane = threadIdx.x % 32, other = self.group ^ 1;
  const bool second = self.group == 1;
  DecodeFp8Storage& storage = self.storage;
#pragma unroll
  for (float& sum : state.sum) sum = sum_over_quad(sum);
  self.sync_group();  // scores that were traded have been read
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    float given[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) given[j] = second ? out.sums[i][j] : out.sums[kKept + i][j];
    storage.scores[self.group][self.warp][i][lane] = make_float4(given[0], given[1], given[2], given[3]);
  }
  if (self.quad == 0) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      storage.peak[self.group][self.warp][self.row + lower * 8] = state.peak[lower];
      storage.sum[self.group][self.warp][self.row + lower * 8] = state.sum[lower];
    }
  }
  if (lane == 0) storage.scale[self.group][self.warp] = out.scale;
  self.sync_pair();
  float own[2], others[2];  // factors of both groups' sums
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const float peak = storage.peak[other][self.warp][self.row + lower * 8], scale_log2 = queries.scale_log2[lower];
    const float offset = offset_of(fmaxf(state.peak[lower], peak), scale_log2);
    own[lower] = exp2_approx(__fmul_rn(state.peak[lower], scale_log2) - offset);
    others[lower] = exp2_approx(__fmul_rn(peak, scale_log2) - offset);
    const float sum = __fmul_rn(state.sum[lower], own[lower]) +
                      __fmul_rn(storage.sum[other][self.warp][self.row + lower * 8], others[lower]);
    rows.inverse[lower] = sum == 0 ? 0 : 1 / sum;
    rows.lse[lower] = offset + log2f(sum);
    own[lower] *= out.scale * (1 / kWeightTop);
    others[lower] *= storage.scale[other][self.warp] * (1 / kWeightTop);
  }
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const float4 taken = storage.scores[other][self.warp][i][lane];
    const float of_other[4] = {taken.x, taken.y, taken.z, taken.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float kept = second ? out.sums[kKept + i][j] : out.sums[i][j];
      joint[i][j] = fmaf(kept, own[j / 2], of_other[j] * others[j / 2]);
    }
  }
  self.sync_pair();  // the next scores may be traded
}

__device__ __forceinline__ void store_fp8_piece(const Fp8Consumer& self, const Piece& piece, const Fp8JointOut& joint,
                                                const Fp8JointRows& rows) {
  constexpr float kLn2 = 0.693147180559945309f;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = self.row + lower * 8, request_row = self.request_row(row);
    if (request_row >= self.num_rows()) continue;
    const int64_t out_row = int64_t(piece.request) * self.num_rows() + request_row;
    const int64_t partial_row = fp8_partial_row(self.params, piece.partial) + row;
    if (self.group == 0 && self.warp == 0 && self.quad == 0) {
      if (piece.partial < 0) {
        self.params.lse[out_row] = rows.lse[lower] * kLn2;
      } else {
        self.params.partial_lse[partial_row] = rows.lse[lower];
      }
    }
#pragma unroll
    for (int i = 0; i < kFp8Tile / 32; ++i) {
      const int column = self.warp * kFp8Tile + self.group * (kFp8Tile / 2) + i * 16 + self.quad * 4;
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = joint[i * 2 + j % 2][lower * 2 + j / 2] * rows.inverse[lower];
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

__device__ __forceinline__ void hide_unseen(const Fp8Consumer& self, const Piece& piece, int page, Fp8Scores& scores) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int first = page * kPageTokens + self.quad * 2;
    const int seen = tokens_seen(self.params, piece.length, self.request_row(self.row + lower * 8)) - first;
#pragma unroll
    for (int octet = 0; octet < kFp8Octets; ++octet) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (octet * 8 + i >= seen) scores[octet][lower * 2 + i] = -INFINITY;
      }
    }
  }
}

__device__ __forceinline__ void consumer_attend_fp8_pieces(DecodeFp8Storage& storage, const MlaDecodeParams& params,
                                                           int warp) {
  const int lane = threadIdx.x % 32;
  Fp8Consumer self{storage, params, warp / kFp8Warps, warp % kFp8Warps, lane / 4, lane % 4};
  while (true) {
    storage.piece_full[self.slot.stage()].wait(self.slot.full_parity());
    const Piece& piece = storage.piece[self.slot.stage()];
    if (piece.first_page == piece.end_page) return;
    Fp8Queries queries;
    load_fp8_queries(self, piece, queries);
    Fp8Softmax state;
    Fp8Out out;
    const int first = piece.first_page + ((self.turn ^ self.group) & 1);
#pragma unroll 1
    for (int page = first; page < piece.end_page; page += kFp8Groups) {
      storage.page_full[self.stage()][0].wait(self.ring.parity);
      if (const int end = piece.length - page * kPageTokens; end < kPageTokens) clear_slots(self, end);
      Fp8Scores scores;
      Fp8Scales scales;
      multiply_keys(self, queries, scores, scales);
      add_over_warps(self, scores);
      if (page >= piece.whole_pages) hide_unseen(self, piece, page, scores);
      float rescale[2];
      weigh_tokens(queries, scores, state, rescale);
      uint32_t weights[kPageTokens / 16][4];
      take_scales(out, scores, scales, rescale, weights);
      if (__any_sync(~0u, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
        for (float (&sums)[4] : out.sums) scale_rows(sums, rescale);
      }
      add_values(self, weights, out);
      self.ring.advance();
    }
    self.turn += piece.end_page - piece.first_page;
    Fp8JointOut joint;
    Fp8JointRows rows;
    join_groups(self, queries, state, out, joint, rows);
    store_fp8_piece(self, piece, joint, rows);
    __syncwarp();
    storage.piece_empty[self.slot.stage()].arrive_for_warp();
    ++self.slot.count;
  }
}

__global__ void __launch_bounds__(kFp8Threads, 1)
    sm90_mla_decode_fp8_kernel(const __grid_constant__ MlaDecodeParams params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& storage = *reinterpret_cast<DecodeFp8Storage*>(shared_bytes);
  let_next_grid_start();
  GroupBarrier::init(kFp8GroupBarrier, kFp8Groups, kFp8GroupThreads);
  GroupBarrier::init(kFp8PairBarrier, kFp8Warps, kFp8PairThreads);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kFp8Stages; ++stage) {
      for (Barrier& full : storage.page_full[stage]) full.init(1);
      for (Barrier& empty : storage.page_empty[stage]) empty.init(kFp8Warps * kArrivalsOfAWarp);
    }
    for (int slot = 0; slot < kTileSlots; ++slot) {
      storage.piece_full[slot].init(1);
      storage.piece_empty[slot].init(kFp8Groups * kFp8Warps * kArrivalsOfAWarp);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp >= kFp8Groups * kFp8Warps) {
    release_registers<40>();
    if (warp == kFp8Groups * kFp8Warps) producer_load_fp8_pieces(storage, params);
  } else {
    claim_registers<232>();
    consumer_attend_fp8_pieces(storage, params, warp);
  }
}

}  // namespace dsv3rt
