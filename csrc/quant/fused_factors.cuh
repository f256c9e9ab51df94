// What belongs to a row of gates and ups in FP8 is multiplied once. With gate g s, up u t and row weight w,
//   w silu(g s) u t = g u / (e / S + 1 / S)   where S = s t w and e = 2^(-g s log2 e),
// so that an element costs one reciprocal and no product with a scale. g u is exact.
#pragma once

#include "hopper/memory.cuh"
#include "quant/swiglu.cuh"

namespace dsv3rt {

// Of a row, for all of its codes.
struct RowFactors {
  float exponent;  // -s log2 e
  float inverse;   // 1 / S
};

// What the gradients need beyond them.
struct GradientFactors {
  float gate_scale, gate_inverse;  // s, 1 / s
  float up_inverse;                // 1 / t
  float weighted_up_inverse;       // 1 / (t w)
};

// Factors fit if no gate is larger than this in size, so that the sigmoid is 2^-58 or more, if up scale times weight is
// not above kLargestUpScale, and if neither scale is under kLeastScale: then nothing on the way over- or underflows
// that the result would not. Of an up scale alone no more is asked than that its inverse is normal.
constexpr float kLargestFusedGate = 40.0f, kLargestUpScale = 8.0f, kLeastScale = 0x1p-24f;
constexpr float kLeastInvertible = 0x1p-100f, kLargestInvertible = 0x1p100f;

constexpr int kFactorRows = 16;  // of a warp

// In shared memory, of each warp. Whole warps call everything.
struct WarpFactors {
  float gate_scale[kFactorRows], up_scale[kFactorRows], weight[kFactorRows];
  RowFactors fused[kFactorRows];

  // Of `rows_left` rows from `row`, in the tile of columns `tile`.
  __device__ __forceinline__ void copy(const GateUpInput& in, int64_t row, int tile, int rows_left) {
    const unsigned lane = thread_idx_read_here() % 32, lane_row = lane % kFactorRows;  // registers are short
    const bool valid = static_cast<int>(lane_row) < rows_left, of_gate = lane < kFactorRows;
    const float* scale = in.scale + (of_gate ? tile : in.hidden / kTile + tile) * in.scale_stride + row + lane_row;
    copy_async<4>(of_gate ? &gate_scale[lane_row] : &up_scale[lane_row], scale, valid);
    if (in.weight != nullptr && of_gate) copy_async<4>(&weight[lane_row], in.weight + row + lane_row, valid);
  }

  // Once copies are there. False: factors of a row do not fit (nor does a NaN), and every element has to be multiplied
  // by its scales. Rows that were not copied are zeros, with any factors that fit.
  template <bool kWeighted, bool kGradients = false>
  __device__ __forceinline__ bool fuse(int rows_left, GradientFactors* gradients = nullptr) {
    __syncwarp();
    const int lane = threadIdx.x % 32, row = lane % kFactorRows;
    const bool exists = row < rows_left;
    const float gate = exists ? gate_scale[row] : 0.0625f, up = exists ? up_scale[row] : 1.0f;
    const float weighted_up = kWeighted && exists ? __fmul_rn(up, weight[row]) : up;
    if (lane < kFactorRows) {
      fused[row] = {__fmul_rn(gate, kMinusLog2E), reciprocal(__fmul_rn(gate, weighted_up))};
    } else if (kGradients) {
      gradients[row] = {gate, reciprocal(gate), reciprocal(up), reciprocal(weighted_up)};
    }
    const bool fit = gate >= kLeastScale && gate * kE4M3Max <= kLargestFusedGate && weighted_up >= kLeastScale &&
                     weighted_up <= kLargestUpScale && up >= kLeastInvertible && up <= kLargestInvertible;
    const bool all_fit = __all_sync(~0u, fit);
    __syncwarp();
    return all_fit;
  }
};

// S over (1 + e): the sigmoid of a gate, times both scales and the row's weight.
__device__ __forceinline__ float fused_sigmoid(float gate, const RowFactors& row) {
  return reciprocal_approx(__fmaf_rn(exp2_approx(__fmul_rn(gate, row.exponent)), row.inverse, row.inverse));
}

__device__ __forceinline__ Octet<__nv_bfloat16> multiply_codes(const GateUp<__nv_fp8_e4m3>& codes,
                                                               const RowFactors& row) {
  float gates[8], ups[8], products[8];
  codes.widen(gates, ups);
#pragma unroll
  for (int i = 0; i < 8; ++i) products[i] = __fmul_rn(__fmul_rn(gates[i], ups[i]), fused_sigmoid(gates[i], row));
  return round_octet(products);
}

}  // namespace dsv3rt
