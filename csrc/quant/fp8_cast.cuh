// Device arithmetic that every cast shares: the exact rules of docs/architecture.md, "Numbers".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace dsv3rt {

constexpr int kTile = 128;
constexpr float kE4M3Max = 448.0f;
constexpr float kAmaxFloor = 0x1p-100f;

struct TileScale {
  float scale;    // multiplies the data
  float inverse;  // what x is multiplied by
};

// amax_bits: bit pattern of the largest |x|. Patterns of NaN and infinity are the largest, so they win every maximum
// and poison the tile.
__device__ __forceinline__ TileScale tile_scale(uint32_t amax_bits, bool pow2) {
  const uint32_t floored = max(amax_bits, __float_as_uint(kAmaxFloor));
  float scale = __fdiv_rn(__uint_as_float(floored), kE4M3Max);
  if (pow2 && floored < 0x7f800000u) scale = __uint_as_float((((__float_as_uint(scale) - 1) >> 23) + 1) << 23);
  return {scale, __frcp_rn(scale)};
}

__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x0, x1), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(x2, x3), __NV_SATFINITE, __NV_E4M3);
  return low | (high << 16);
}

// Eight neighbouring elements of a row, as loaded from memory.
template <typename Element>
struct Octet;

template <>
struct Octet<__nv_bfloat16> {
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

  __device__ __forceinline__ uint32_t amax_bits() const {
    constexpr uint32_t kMagnitude = 0x7fff7fffu;
    const uint32_t pairs = __vmaxu2(__vmaxu2(words.x & kMagnitude, words.y & kMagnitude),
                                    __vmaxu2(words.z & kMagnitude, words.w & kMagnitude));
    return max(pairs << 16, pairs & 0xffff0000u);
  }
};

template <>
struct Octet<float> {
  float4 low, high;

  __device__ __forceinline__ void load(const float* source) {
    low = *reinterpret_cast<const float4*>(source);
    high = *reinterpret_cast<const float4*>(source + 4);
  }
  __device__ __forceinline__ void clear() { low = high = make_float4(0, 0, 0, 0); }

  __device__ __forceinline__ float get(int i) const {
    const float4& half = i < 4 ? low : high;
    return i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w;
  }

  __device__ __forceinline__ uint32_t amax_bits() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits = max(bits, __float_as_uint(get(i)) & 0x7fffffffu);
    return bits;
  }
};

template <typename Element>
__device__ __forceinline__ uint2 quantize_octet(const Octet<Element>& x, float inverse) {
  return make_uint2(pack_e4m3(x.get(0) * inverse, x.get(1) * inverse, x.get(2) * inverse, x.get(3) * inverse),
                    pack_e4m3(x.get(4) * inverse, x.get(5) * inverse, x.get(6) * inverse, x.get(7) * inverse));
}

}  // namespace dsv3rt
