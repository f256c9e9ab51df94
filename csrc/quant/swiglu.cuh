// SwiGLU as a source of the 1x128 casts, and its arithmetic: every operation rounds to FP32 by itself, so that the
// reference in plain torch does the same; the product is rounded to BF16 before it is quantised.
#pragma once

#include "hopper/convert.cuh"
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
  const float inverse = reciprocal(x), sigmoid = gate < kLowestGate ? 0.0f : inverse;
  return {sigmoid, __fmul_rn(gate, sigmoid)};
}

// Eight neighbouring gates and the eight ups that they belong to.
template <typename Type>
struct GateUp;

template <>
struct GateUp<__nv_bfloat16> {
  using Words = uint4;
  Octet<__nv_bfloat16> gate, up;

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
  using Words = uint2;
  uint2 gate, up;
  float gate_scale, up_scale;

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
    widen(gates, ups);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      gates[i] = __fmul_rn(gates[i], gate_scale);
      ups[i] = __fmul_rn(ups[i], up_scale);
    }
  }
  // The codes themselves.
  __device__ __forceinline__ void widen(float (&gates)[8], float (&ups)[8]) const {
    widen_octet(gate, gates);
    widen_octet(up, ups);
  }

 private:
  static __device__ __forceinline__ void widen_octet(uint2 codes, float (&values)[8]) {
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
      const HalfPairs pairs = widen_e4m3(quad == 0 ? codes.x : codes.y);
      const float2 lower = widen_halves(pairs.lower), upper = widen_halves(pairs.upper);
      values[4 * quad] = lower.x;
      values[4 * quad + 1] = lower.y;
      values[4 * quad + 2] = upper.x;
      values[4 * quad + 3] = upper.y;
    }
  }
  static __device__ __forceinline__ float2 widen_halves(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

// silu(gate) * up, times the row's weight where kWeighted.
template <bool kWeighted, typename Type>
__device__ __forceinline__ Octet<__nv_bfloat16> multiply(const GateUp<Type>& in, float weight) {
  float gates[8], ups[8], products[8];
  in.unpack(gates, ups);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    products[i] = __fmul_rn(activate(gates[i]).silu, ups[i]);
    if (kWeighted) products[i] = __fmul_rn(products[i], weight);
  }
  return round_octet(products);
}

template <typename Type>
class SwigluSource {
 public:
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

  __device__ __forceinline__ SwigluSource(const Params& in, int64_t row, int column)
      : gate_(static_cast<const Type*>(in.data) + row * in.stride + column),
        gate_scale_(in.scale + column / kTile * in.scale_stride + row),
        up_scale_(in.scale + (in.hidden + column) / kTile * in.scale_stride + row),
        weight_(in.weight == nullptr ? nullptr : in.weight + row),
        stride_(in.stride),
        hidden_(in.hidden) {}

  __device__ __forceinline__ void load(Raw& raw, int r) const {
    using Words = GateUp<Type>::Words;
    const Type* gate = gate_ + r * stride_;
    float gate_scale = 1.0f, up_scale = 1.0f;
    if (sizeof(Type) == 1) gate_scale = gate_scale_[r], up_scale = up_scale_[r];
    raw.in.set(*reinterpret_cast<const Words*>(gate), *reinterpret_cast<const Words*>(gate + hidden_), gate_scale,
               up_scale);
    raw.weight = weight_ == nullptr ? 1.0f : weight_[r];
  }

  static __device__ __forceinline__ Octet<__nv_bfloat16> octet(const Raw& raw) {
    return multiply<true>(raw.in, raw.weight);
  }

 private:
  const Type* gate_;
  const float *gate_scale_, *up_scale_, *weight_;
  int64_t stride_;
  int hidden_;
};

}  // namespace dsv3rt
