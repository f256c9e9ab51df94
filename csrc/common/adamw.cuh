// One AdamW update of one element: the operations of dsv3rt.ops.reference.optim, each rounded by itself, so that
// kernels and reference agree to the bit.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/adamw.h"

namespace dsv3rt {

__device__ __forceinline__ void adamw_update(const AdamWNumbers& n, float g, float& master, float& m, float& v) {
  m = __fadd_rn(__fmul_rn(m, n.beta1), __fmul_rn(g, n.one_minus_beta1));
  v = __fadd_rn(__fmul_rn(v, n.beta2), __fmul_rn(__fmul_rn(g, g), n.one_minus_beta2));
  const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(v), n.inverse_root), n.eps);
  master = __fadd_rn(__fmul_rn(master, n.decay), __fdiv_rn(__fmul_rn(m, n.rate), denominator));
}

// Every input bit moves every output bit (the finaliser of MurmurHash3).
__device__ __forceinline__ uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// 32 random bits of an element: the lower half is for the first moment, the upper half for the second.
__device__ __forceinline__ uint32_t rounding_bits(const RoundingKey& key, int64_t element) {
  const auto low = static_cast<uint32_t>(element), high = static_cast<uint32_t>(element >> 32);
  return mix_bits(mix_bits(low ^ key.first) + key.second + high);
}

// Up or down with the probabilities that make the mean x; `random` has 16 bits. NaN and infinity stay.
__device__ __forceinline__ float round_stochastically(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? __uint_as_float((bits + random) & 0xffff0000u) : x;
}

}  // namespace dsv3rt
