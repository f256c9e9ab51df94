// What a warp of the decoding kernel over the FP8 cache has in registers, and its part of a page's scores: those of all
// tokens over its tile of columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper/convert.cuh"
#include "hopper/fragment.cuh"
#include "hopper/mma.cuh"
#include "hopper/shared.cuh"
#include "mla/decode_fp8_storage.cuh"
#include "mla/softmax.cuh"

namespace dsv3rt {

constexpr int kFp8Barrier = 1;  // named, of the warps that multiply
constexpr int kFp8Tile = 128;  // columns with one scale
constexpr int kFp8Steps = kFp8Tile / 16;
constexpr int kFp8RopeColumns = 64 / kFp8Warps;  // of a warp
constexpr int kTopExponent = 7;  // weights are at most 2^7, scales below 2^8: their product is below F16's end
constexpr int kLeastExponent = 127 - 110;  // of scales, as floats have it

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t multiply_half(uint32_t a, uint32_t b) {
  const __half2 product = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float(exponent << 23); }  // biased by 127

__device__ __forceinline__ float largest_of(const float4& x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float largest_of(uint32_t pair) {
  return fmaxf(fabsf(low_bf16(pair)), fabsf(high_bf16(pair)));
}

// ---- What a warp that multiplies knows throughout. Its lanes hold rows `row` and `row + 8`.

struct Fp8Consumer {
  DecodeFp8Storage& storage;
  const MlaDecodeParams& params;
  int warp;
  int row, quad;  // lane / 4, lane % 4
  TwoStage slot;
  Fp8Ring ring;

  __device__ __forceinline__ uint8_t* token(int index) const {
    return storage.page[ring.stage] + index * kFp8TokenBytes;
  }
  __device__ __forceinline__ int num_rows() const { return params.num_queries * params.num_heads; }
  __device__ __forceinline__ int request_row(int block_row) const { return blockIdx.x * kFp8Rows + block_row; }
  __device__ __forceinline__ void sync() const { named_barrier_sync(kFp8Barrier, 32 * kFp8Warps); }
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
    if (self.quad == 0) self.storage.largest[self.row + lower * 8][self.warp] = largest;
  }
  self.sync();  // the next queries come after a page's scores were traded
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const float largest = largest_of(reinterpret_cast<const float4&>(self.storage.largest[self.row + lower * 8]));
    // The power of two that takes the largest to 2^13 .. 2^14, by its exponent.
    const int exponent = min(127 + 13 + 127 - (__float_as_int(largest) >> 23), 253);
    const float factor = power_of_two(exponent);
    queries.scale_log2[lower] = self.params.scale_log2 * power_of_two(254 - exponent);
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

// ---- Scores of a page, of this warp's columns: [octet of tokens][as of an accumulator]

using Fp8Scores = float[kFp8Octets][4];

// 128 columns of the output: sums[2 i + j] holds, of its two rows, columns 16 i + 2 n + j for n = 2 quad and the next.
// They stand for themselves over the power of two under the largest scale so far, which has that exponent.
struct Fp8Out {
  float sums[kFp8Tile / 8][4] = {};
  int exponent = kLeastExponent;
};

// Scales of a lane's tokens over that power, times 2^kTopExponent, in F16: those of an octet.
struct Fp8Scales {
  uint32_t pairs[kFp8Octets];
  float grown;  // what the output must be multiplied by
};

__device__ __forceinline__ void multiply_keys(const Fp8Consumer& self, const Fp8Queries& queries, Fp8Scores& scores) {
  const int lane = threadIdx.x % 32;
  // This lane's row of the matrices: those of a step are 16 columns of eight tokens.
  const uint32_t keys = smem_address(self.token(lane % 8)) + self.warp * kFp8Tile + lane / 8 * 16;
#pragma unroll
  for (float (&sums)[4] : scores) {
#pragma unroll
    for (float& sum : sums) sum = 0;
  }
#pragma unroll
  for (int step = 0; step < kFp8Steps; step += 4) {
#pragma unroll
    for (int octet = 0; octet < kFp8Octets; ++octet) {
      uint32_t words[4];
      load_matrices(words, keys + octet * 8 * kFp8TokenBytes + step * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const HalfPairs pairs = widen_e4m3(words[i]);
        mma_f16(scores[octet], queries.latent[step + i], pairs.lower, pairs.upper);
      }
    }
  }
}

// Scores take their tokens' scales, and in passing the output learns of them.
__device__ __forceinline__ void take_scales(const Fp8Consumer& self, Fp8Scores& scores, Fp8Out& out,
                                            Fp8Scales& scales) {
  const uint8_t* of_token = self.token(self.quad * 2) + kLatentDim + self.warp * 4;
  float own[kFp8Octets][2], largest = 0;
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[octet][i] = *reinterpret_cast<const float*>(of_token + (octet * 8 + i) * kFp8TokenBytes);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[octet][i] *= own[octet][i % 2];
    largest = fmaxf(largest, fmaxf(own[octet][0], own[octet][1]));
  }
  const int exponent = max(out.exponent, __float_as_int(max_over_quad(largest)) >> 23);
  const float inverse = power_of_two(254 + kTopExponent - exponent);
  scales.grown = power_of_two(max(127 + out.exponent - exponent, 0));
  out.exponent = exponent;
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; ++octet) {
    scales.pairs[octet] = pack_half(own[octet][0] * inverse, own[octet][1] * inverse);
  }
}

__device__ __forceinline__ void multiply_rope_keys(const Fp8Consumer& self, const Fp8Queries& queries,
                                                   Fp8Scores& scores) {
  const int lane = threadIdx.x % 32;
  const uint32_t keys = smem_address(self.token(lane / 16 * 8 + lane % 8)) + kFp8RopeOffset +
                        self.warp * kFp8RopeColumns * 2 + lane / 8 % 2 * 16;
#pragma unroll
  for (int octet = 0; octet < kFp8Octets; octet += 2) {
    uint32_t words[4];
    load_matrices(words, keys + octet * 8 * kFp8TokenBytes);
    mma_bf16(scores[octet], queries.rope, words[0], words[1]);
    mma_bf16(scores[octet + 1], queries.rope, words[2], words[3]);
  }
}

}  // namespace dsv3rt
