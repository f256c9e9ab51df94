// New tokens into the latent cache: latents normed, rope keys turned, both rounded to BF16, latents quantised for the
// FP8 cache. One warp a token; a lane has two octets of the latent, 256 apart, and one pair of rope keys.
#pragma once

#include <cuda_fp8.h>

#include "common/octet.cuh"
#include "mla/append_params.h"

namespace dsv3rt {

constexpr int kAppendWarps = 8;
constexpr int kLaneOctets = kLatentDim / kOctet / 32;
constexpr int kTileLanes = 128 / kOctet;  // neighbours whose octets make a tile

struct AppendedToken {
  float latent[kLaneOctets][kOctet];  // BF16 numbers
  uint32_t rope;                      // a pair of BF16 numbers
};

__device__ __forceinline__ float rounded_to_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

__device__ __forceinline__ void norm_latent(const AppendParams& params, const __nv_bfloat16* source, int lane,
                                            AppendedToken& token) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kLaneOctets; ++i) {
    load_octet(source + (i * 32 + lane) * kOctet, token.latent[i]);
#pragma unroll
    for (const float x : token.latent[i]) squares = fmaf(x, x, squares);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(~0u, squares, distance);
  const float rstd = __frsqrt_rn(__fadd_rn(squares * (1.0f / kLatentDim), params.eps));
#pragma unroll
  for (int i = 0; i < kLaneOctets; ++i) {
    float weight[kOctet];
    load_octet(static_cast<const __nv_bfloat16*>(params.weight) + (i * 32 + lane) * kOctet, weight);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      token.latent[i][j] = rounded_to_bf16(__fmul_rn(__fmul_rn(token.latent[i][j], rstd), weight[j]));
    }
  }
}

__device__ __forceinline__ uint32_t turned_pair(const AppendParams& params, const __nv_bfloat16* source, int row,
                                                int lane) {
  const float cosine = params.cosines[int64_t(row) * 32 + lane], sine = params.sines[int64_t(row) * 32 + lane];
  const uint32_t words = reinterpret_cast<const uint32_t*>(source + kLatentDim)[lane];
  const float even = __uint_as_float(words << 16), odd = __uint_as_float(words & 0xffff0000u);
  return bf16_pair(__fsub_rn(__fmul_rn(even, cosine), __fmul_rn(odd, sine)),
                   __fadd_rn(__fmul_rn(even, sine), __fmul_rn(odd, cosine)));
}

// A power of two that takes the tile's largest to 448 at most. Patterns of infinity and NaN are the largest: they
// become the scale, and so the whole tile.
__device__ __forceinline__ float scale_of_tile(uint32_t largest_bits) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  if (largest_bits >= kInfinity) return __uint_as_float(largest_bits);
  const float scale = __fdiv_rn(fmaxf(__uint_as_float(largest_bits), 0x1p-100f), 448.0f);
  return __uint_as_float((((__float_as_uint(scale) - 1) >> 23) + 1) << 23);
}

__device__ __forceinline__ uint32_t pack_e4m3(const float* x, float factor) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x[0] * factor, x[1] * factor), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(x[2] * factor, x[3] * factor), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

__device__ __forceinline__ void store_fp8_token(uint8_t* target, int lane, const AppendedToken& token) {
#pragma unroll
  for (int i = 0; i < kLaneOctets; ++i) {
    uint32_t largest = 0;
#pragma unroll
    for (const float x : token.latent[i]) largest = max(largest, __float_as_uint(x) & 0x7fffffffu);
#pragma unroll
    for (int distance = kTileLanes / 2; distance > 0; distance /= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    const float scale = scale_of_tile(largest), factor = __frcp_rn(scale);
    const int octet = i * 32 + lane;
    *reinterpret_cast<uint2*>(target + octet * kOctet) =
        make_uint2(pack_e4m3(token.latent[i], factor), pack_e4m3(token.latent[i] + 4, factor));
    if (lane % kTileLanes == 0) reinterpret_cast<float*>(target + kLatentDim)[octet / kTileLanes] = scale;
  }
  reinterpret_cast<uint32_t*>(target + kFp8RopeOffset)[lane] = token.rope;
}

__device__ __forceinline__ void store_bf16_token(__nv_bfloat16* target, int lane, const AppendedToken& token) {
#pragma unroll
  for (int i = 0; i < kLaneOctets; ++i) store_octet(target + (i * 32 + lane) * kOctet, token.latent[i]);
  reinterpret_cast<uint32_t*>(target + kLatentDim)[lane] = token.rope;
}

template <bool kFp8>
__global__ void __launch_bounds__(32 * kAppendWarps)
    append_latents_kernel(const __grid_constant__ AppendParams params) {
  const int lane = threadIdx.x % 32, row = blockIdx.x * kAppendWarps + threadIdx.x / 32;
  if (row >= params.num_tokens) return;
  const int64_t slot = params.slots[row];
  if (slot < 0 || slot >= params.num_slots) return;
  const auto* source = static_cast<const __nv_bfloat16*>(params.rows) + row * params.row_stride;
  AppendedToken token;
  norm_latent(params, source, lane, token);
  token.rope = turned_pair(params, source, row, lane);
  if constexpr (kFp8) {
    store_fp8_token(static_cast<uint8_t*>(params.cache) + slot * kFp8TokenBytes, lane, token);
  } else {
    store_bf16_token(static_cast<__nv_bfloat16*>(params.cache) + slot * kCachedDim, lane, token);
  }
}

}  // namespace dsv3rt
