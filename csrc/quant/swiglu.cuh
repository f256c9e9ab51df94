// SwiGLU as a source of the 1x128 casts, and its arithmetic: every operation rounds to FP32 by itself, so that the
// reference in plain torch does the same; the product is rounded to BF16 before it is quantised.
#pragma once

#include "quant/quantize_1x128.cuh"

namespace dsv3rt {

struct Activation {
  float sigmoid, silu;
};

// Under this gate the sigmoid, 1.8e-35, is taken as zero: its reciprocal would be subnormal soon, and silu is far under
// the casts' floor of 2^-100.
constexpr float kLowestGate = -80.0f;
constexpr float kMinusLog2E = -1.4426950408889634f;

__device__ __forceinline__ Activation activate(float gate) {
  const float x = __fadd_rn(1.0f, exp2_approx(__fmul_rn(gate, kMinusLog2E)));
  const float reciprocal = refine_reciprocal(x, reciprocal_approx(x));
  const float sigmoid = gate < kLowestGate ? 0.0f : reciprocal;
  return {sigmoid, __fmul_rn(gate, sigmoid)};
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Eight neighbouring gates and the eight ups that they belong to.
template <typename Type>
struct GateUp;

template <>
struct GateUp<__nv_bfloat16> {
  Octet<__nv_bfloat16> gate, up;

  __device__ __forceinline__ void load(const GateUpInput& in, int64_t row, int column) {
    const auto* source = static_cast<const __nv_bfloat16*>(in.data) + row * in.stride + column;
    gate.load(source);
    up.load(source + in.hidden);
  }
  __device__ __forceinline__ void set(const uint4& gate_words, const uint4& up_words, float, float) {
    gate.words = gate_words;
    up.words = up_words;
  }
  __device__ __forceinline__ void clear() {
    gate.clear();
    up.clear();
  }
  __device__ __forceinline__ void unpack(float (&gates)[8], float (&ups)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      gates[i] = gate.get(i);
      ups[i] = up.get(i);
    }
  }
};

template <>
struct GateUp<__nv_fp8_e4m3> {
  uint2 gate, up;
  float gate_scale, up_scale;

  __device__ __forceinline__ void load(const GateUpInput& in, int64_t row, int column) {
    const auto* source = static_cast<const uint8_t*>(in.data) + row * in.stride + column;
    gate = *reinterpret_cast<const uint2*>(source);
    up = *reinterpret_cast<const uint2*>(source + in.hidden);
    gate_scale = in.scale[column / kTile * in.scale_stride + row];
    up_scale = in.scale[(in.hidden + column) / kTile * in.scale_stride + row];
  }
  __device__ __forceinline__ void set(const uint2& gate_words, const uint2& up_words, float gate_factor,
                                      float up_factor) {
    gate = gate_words;
    up = up_words;
    gate_scale = gate_factor;
    up_scale = up_factor;
  }
  __device__ __forceinline__ void clear() {
    gate = up = make_uint2(0, 0);
    gate_scale = up_scale = 0.0f;
  }
  __device__ __forceinline__ void unpack(float (&gates)[8], float (&ups)[8]) const {
    dequantize(gate, gate_scale, gates);
    dequantize(up, up_scale, ups);
  }

 private:
  static __device__ __forceinline__ void dequantize(uint2 codes, float scale, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>((i < 2 ? codes.x : codes.y) >> (i % 2 * 16));
      const float2 wide = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      values[2 * i] = __fmul_rn(wide.x, scale);
      values[2 * i + 1] = __fmul_rn(wide.y, scale);
    }
  }
};

__device__ __forceinline__ float row_weight(const GateUpInput& in, int64_t row) {
  return in.weight == nullptr ? 1.0f : in.weight[row];
}

template <typename Type>
struct SwigluSource {
  using Params = GateUpInput;
  using Element = __nv_bfloat16;
  struct Raw {
    GateUp<Type> in;
    float weight;

    __device__ __forceinline__ void clear() {
      in.clear();
      weight = 0.0f;
    }
  };

  static __device__ __forceinline__ void load(const Params& in, Raw& raw, int64_t row, int column) {
    raw.in.load(in, row, column);
    raw.weight = row_weight(in, row);
  }

  static __device__ __forceinline__ Octet<__nv_bfloat16> octet(const Raw& raw) {
    float gates[8], ups[8], products[8];
    raw.in.unpack(gates, ups);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      products[i] = __fmul_rn(__fmul_rn(activate(gates[i]).silu, ups[i]), raw.weight);
    }
    return {make_uint4(pack_bf16(products[0], products[1]), pack_bf16(products[2], products[3]),
                       pack_bf16(products[4], products[5]), pack_bf16(products[6], products[7]))};
  }
};

}  // namespace dsv3rt
