// Rotary positions: eight columns, four pairs, a step; a thread takes four steps, all loads before the first store, so
// that it may write where it reads.
#pragma once

#include <cuda_bf16.h>

#include "embed/params.h"

namespace dsv3rt {

constexpr int kRopeThreads = 256;
constexpr int kRopeSteps = 4;

// One of the two numbers of a word.
__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// Products and sum are rounded by themselves, as the reference in plain torch does it.
__device__ __forceinline__ uint32_t turn_pair(uint32_t pair, float cos, float sin) {
  const float even = low_half(pair), odd = high_half(pair);
  const __nv_bfloat162 turned = __floats2bfloat162_rn(__fsub_rn(__fmul_rn(even, cos), __fmul_rn(odd, sin)),
                                                      __fadd_rn(__fmul_rn(even, sin), __fmul_rn(odd, cos)));
  return *reinterpret_cast<const uint32_t*>(&turned);
}

__device__ __forceinline__ uint4 turn_octet(const uint4& x, const float4& cos, const float4& sin) {
  return make_uint4(turn_pair(x.x, cos.x, sin.x), turn_pair(x.y, cos.y, sin.y), turn_pair(x.z, cos.z, sin.z),
                    turn_pair(x.w, cos.w, sin.w));
}

// Where octet `number` of all of x, column first, then head, then token, lies.
struct RopePlace {
  int64_t token;
  int head, column;

  __device__ __forceinline__ RopePlace(const RopeParams& params, unsigned number) {
    const unsigned octets = params.num_columns / 8, row = number / octets;
    column = static_cast<int>(number % octets * 8);
    token = row / params.num_heads;
    head = static_cast<int>(row % params.num_heads);
  }
  __device__ __forceinline__ uint4* in(const HeadRows& rows) const {
    auto* data = static_cast<__nv_bfloat16*>(rows.data);
    return reinterpret_cast<uint4*>(data + token * rows.token_stride + head * rows.head_stride + column);
  }
  __device__ __forceinline__ float4 in(const float* table, int num_columns) const {
    return *reinterpret_cast<const float4*>(table + token * (num_columns / 2) + column / 2);
  }
};

__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const RopeParams params, const unsigned num_octets) {
  const unsigned first = blockIdx.x * (kRopeThreads * kRopeSteps) + threadIdx.x;
  uint4 octets[kRopeSteps];
#pragma unroll
  for (int i = 0; i < kRopeSteps; ++i) {
    const unsigned number = first + i * kRopeThreads;
    octets[i] = number < num_octets ? *RopePlace(params, number).in(params.x) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kRopeSteps; ++i) {
    const unsigned number = first + i * kRopeThreads;
    if (number >= num_octets) return;
    const RopePlace place(params, number);
    const float4 cos = place.in(params.cos, params.num_columns);
    float4 sin = place.in(params.sin, params.num_columns);
    if (params.inverse) sin = make_float4(-sin.x, -sin.y, -sin.z, -sin.w);
    *place.in(params.y) = turn_octet(octets[i], cos, sin);
  }
}

}  // namespace dsv3rt
