// Device arithmetic that every cast shares: the exact rules of docs/architecture.md, "Numbers".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/bf16_pack.cuh"
#include "hopper/arithmetic.cuh"

namespace dsv3rt {

constexpr int kTile = 128;
constexpr float kE4M3Max = 448.0f;
constexpr float kAmaxFloor = 0x1p-100f;
constexpr uint32_t kInfinityBits = 0x7f800000;

struct TileScale {
  float scale;    // multiplies the data
  float inverse;  // what x is multiplied by
};

// From an estimate of 1 / x to its correct rounding for 2^-126 <= x < 2^126: the step that __frcp_rn takes there, too.
__device__ __forceinline__ float refine_reciprocal(float x, float estimate) {
  return __fmaf_rn(estimate, -__fmaf_rn(x, estimate, -1.0f), estimate);
}

// 1 / x, correctly rounded in that range.
__device__ __forceinline__ float reciprocal(float x) { return refine_reciprocal(x, reciprocal_approx(x)); }

// x / 448, correctly rounded for normal results: the remainder is exact and corrects a quotient that is an ulp off at
// most.
__device__ __forceinline__ float divide_by_max(float x) {
  constexpr float kInverse = 1.0f / kE4M3Max;
  const float quotient = __fmul_rn(x, kInverse);
  return __fmaf_rn(__fmaf_rn(-quotient, kE4M3Max, x), kInverse, quotient);
}

// amax_bits: bit pattern of the largest |x|. Patterns of NaN and infinity are the largest, so they win every maximum
// and poison the tile. No branches: estimates of 1 / infinity and 1 / NaN are 0 and NaN already.
__device__ __forceinline__ TileScale tile_scale(uint32_t amax_bits, uint32_t scale_mask) {
  const bool finite = amax_bits < kInfinityBits;
  const float amax = __uint_as_float(max(amax_bits, __float_as_uint(kAmaxFloor)));
  const uint32_t rounded = (__float_as_uint(divide_by_max(amax)) + scale_mask) & ~scale_mask;
  const float scale = finite ? __uint_as_float(rounded) : amax;
  const float estimate = reciprocal_approx(scale), refined = refine_reciprocal(scale, estimate);
  return {scale, finite ? refined : estimate};
}

__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1) {
  return __nv_cvt_float2_to_fp8x2(make_float2(x0, x1), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  return pack_e4m3(x0, x1) | pack_e4m3(x2, x3) << 16;
}

// Eight neighbouring elements of a row, as loaded from memory.
template <typename Element>
struct Octet;

template <>
struct Octet<__nv_bfloat16> {
  static constexpr int kPatternWords = 4;
  using Pattern = uint16_t;  // what a magnitude is kept in
  uint4 words;

  __device__ __forceinline__ void load(const __nv_bfloat16* source) { words = *reinterpret_cast<const uint4*>(source); }
  __device__ __forceinline__ void clear() { words = make_uint4(0, 0, 0, 0); }

  __device__ __forceinline__ uint32_t word(int i) const {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }

  __device__ __forceinline__ float get(int i) const {
    const uint32_t pair = word(i / 2);
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  }

  __device__ __forceinline__ void set(int i, __nv_bfloat16 x) {
    uint32_t& pair = i / 2 == 0 ? words.x : i / 2 == 1 ? words.y : i / 2 == 2 ? words.z : words.w;
    const uint32_t bits = __bfloat16_as_ushort(x);
    pair = i % 2 ? (pair & 0xffffu) | bits << 16 : (pair & 0xffff0000u) | bits;
  }

  // Magnitudes of pairs of elements; the larger of two by halves.
  __device__ __forceinline__ uint32_t patterns(int i) const { return word(i) & 0x7fff7fffu; }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }
  static __device__ __forceinline__ uint32_t float_bits(Pattern pattern) { return uint32_t(pattern) << 16; }

  __device__ __forceinline__ uint32_t amax_bits() const {
    const uint32_t pairs = larger(larger(patterns(0), patterns(1)), larger(patterns(2), patterns(3)));
    return max(pairs << 16, pairs & 0xffff0000u);
  }
};

template <>
struct Octet<float> {
  static constexpr int kPatternWords = 8;
  using Pattern = uint32_t;
  uint4 low, high;

  __device__ __forceinline__ void load(const float* source) {
    low = reinterpret_cast<const uint4*>(source)[0];
    high = reinterpret_cast<const uint4*>(source)[1];
  }
  __device__ __forceinline__ void clear() { low = high = make_uint4(0, 0, 0, 0); }

  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& half = i < 4 ? low : high;
    return i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w;
  }

  __device__ __forceinline__ float get(int i) const { return __uint_as_float(word(i)); }

  __device__ __forceinline__ void set(int i, float x) {
    uint4& half = i < 4 ? low : high;
    (i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w) = __float_as_uint(x);
  }

  __device__ __forceinline__ uint32_t patterns(int i) const { return word(i) & 0x7fffffffu; }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
  static __device__ __forceinline__ uint32_t float_bits(Pattern pattern) { return pattern; }

  __device__ __forceinline__ uint32_t amax_bits() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits = max(bits, patterns(i));
    return bits;
  }
};

__device__ __forceinline__ Octet<__nv_bfloat16> round_octet(const float (&x)[8]) { return {pack_bf16(x)}; }

template <typename Element>
__device__ __forceinline__ uint2 quantize_octet(const Octet<Element>& x, float inverse) {
  return make_uint2(pack_e4m3(x.get(0) * inverse, x.get(1) * inverse, x.get(2) * inverse, x.get(3) * inverse),
                    pack_e4m3(x.get(4) * inverse, x.get(5) * inverse, x.get(6) * inverse, x.get(7) * inverse));
}

}  // namespace dsv3rt
