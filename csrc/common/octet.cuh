// Eight neighbouring elements, BF16 or FP32, as FP32 numbers: 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dsv3rt {

constexpr int kOctet = 8;

__device__ __forceinline__ void load_octet(const float* source, float (&x)[kOctet]) {
  const float4 low = reinterpret_cast<const float4*>(source)[0], high = reinterpret_cast<const float4*>(source)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void load_octet(const __nv_bfloat16* source, float (&x)[kOctet]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}

__device__ __forceinline__ void store_octet(float* target, const float (&x)[kOctet]) {
  reinterpret_cast<float4*>(target)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(target)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return uint32_t(__bfloat16_as_ushort(pair.x)) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
}

__device__ __forceinline__ void store_octet(__nv_bfloat16* target, const float (&x)[kOctet]) {
  *reinterpret_cast<uint4*>(target) =
      make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
}

__device__ __forceinline__ float load_one(const float* source) { return *source; }
__device__ __forceinline__ float load_one(const __nv_bfloat16* source) { return __bfloat162float(*source); }
__device__ __forceinline__ void store_one(float* target, float x) { *target = x; }
__device__ __forceinline__ void store_one(__nv_bfloat16* target, float x) { *target = __float2bfloat16_rn(x); }

}  // namespace dsv3rt
