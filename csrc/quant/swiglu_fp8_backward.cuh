// SwiGLU backward from FP8: sixteen columns of four rows a thread.
#pragma once

#include "quant/swiglu_backward.cuh"
#include "quant/swiglu_fp8.cuh"

namespace dsv3rt {

// With o = S sigmoid, which fused_sigmoid yields: the product is g u o, and for the gradient y of the product
//   gradient of up    y w silu(g s)              = y o (g / t)
//   gradient of gate  y w u t sigmoid (1 + g (s - s sigmoid)) = y o (u / s) (1 + g (s - o / (t w)))
// and the part in the gradient of the weight, here still times w, y o g u.
template <bool kWeighted>
__device__ __forceinline__ SwigluGradients differentiate_codes(const GateUp<__nv_fp8_e4m3>& codes,
                                                               const Octet<__nv_bfloat16>& grad, const RowFactors& row,
                                                               const GradientFactors& factors) {
  float gates[8], ups[8], weight_grad = 0.0f;
  codes.widen(gates, ups);
  SwigluGradients result = pack_gradients([&](int i) {
    const float gate = gates[i], up = ups[i], dy = grad.get(i);
    const float scaled = fused_sigmoid(gate, row), common = __fmul_rn(dy, scaled);
    const float rest = __fmaf_rn(-scaled, factors.weighted_up_inverse, factors.gate_scale);
    ElementGradients element;
    element.product = __fmul_rn(__fmul_rn(gate, up), scaled);
    element.up = __fmul_rn(common, __fmul_rn(gate, factors.up_inverse));
    element.gate = __fmul_rn(__fmul_rn(common, __fmul_rn(up, factors.gate_inverse)), __fmaf_rn(gate, rest, 1.0f));
    if (kWeighted) weight_grad += dy * element.product;
    return element;
  });
  result.weight = weight_grad;
  return result;
}

// What a block keeps in shared memory. Each thread copies the elements that it will read itself, so that no barrier is
// needed before the results are there, which take the place of the inputs, two slots each. Once the gradient of gate is
// in registers, the transposed tile takes its place.
template <bool kWithProduct>
struct WideBackwardStorage {
  WideSlots gradients[2][2];  // of gate, where gates and ups were, and of up, where that of the product was
  WideSlots product[kWithProduct ? 2 : 0];
  WarpFactors factors[kWideWarps];
  GradientFactors gradient_factors[kWideWarps][kFactorRows];
  WideColumnScales columns;

  __device__ __forceinline__ TransposedTile& tile() { return reinterpret_cast<TransposedTile&>(gradients[0]); }

  __device__ __forceinline__ void copy_inputs(const SwigluBackwardParams& params, const TilePlace& place) {
    const unsigned thread = thread_idx_read_here();  // registers are short
    const int row_in_tile = wide_row(thread), column = place.first_column + wide_column(thread);
    const auto* dy =
        static_cast<const __nv_bfloat16*>(params.grad) + (place.first_row + row_in_tile) * params.grad_stride + column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r, dy += params.grad_stride) {
      const bool valid = row_in_tile + r < place.rows.read;
      copy_async<16>(&gradients[1][0][r][thread], dy, valid);
      copy_async<16>(&gradients[1][1][r][thread], dy + 8, valid);
    }
    const int warp_row = row_in_tile / kFactorRows * kFactorRows;
    copy_wide_codes(params.in, place.first_row + warp_row, column, place.rows.read - warp_row, gradients[0][0],
                    gradients[0][1], factors[thread / 32]);
    copy_async_commit();
  }

  // Waits for the copies. Whole warps call it.
  template <bool kWeighted>
  __device__ __forceinline__ bool fuse_factors(const TilePlace& place) {
    copy_async_wait<0>();
    const int warp = threadIdx.x / 32;
    return factors[warp].template fuse<kWeighted, true>(place.rows.read - warp * kFactorRows, gradient_factors[warp]);
  }

  template <bool kFused, bool kWeighted>
  __device__ __forceinline__ SwigluGradients differentiate_octet(int r, int half, const uint4& gates,
                                                                 const uint4& ups) const {
    const WarpFactors& own = factors[threadIdx.x / 32];
    const int row = wide_row(threadIdx.x) % kFactorRows + r;
    const GateUp<__nv_fp8_e4m3> in = octet_of_codes(gates, ups, half, own, row);
    const Octet<__nv_bfloat16> dy{gradients[1][half][r][threadIdx.x]};
    if constexpr (!kFused) return differentiate<kWeighted>(in, dy, kWeighted ? own.weight[row] : 1.0f);
    const GradientFactors& gradient = gradient_factors[threadIdx.x / 32][row];
    SwigluGradients result = differentiate_codes<kWeighted>(in, dy, own.fused[row], gradient);
    if (kWeighted) result.weight *= __fmul_rn(own.up_scale[row], gradient.weighted_up_inverse);
    return result;
  }
};

// Row by row, as in differentiate_tile.
template <bool kFused, bool kWithProduct, bool kWeighted>
__device__ __forceinline__ void differentiate_wide(const SwigluBackwardParams& params, const TilePlace& place,
                                                   WideBackwardStorage<kWithProduct>& storage) {
#pragma unroll 1
  for (int r = 0; r < kRowsPerThread; ++r) {
    auto& gradients = storage.gradients;
    const uint4 gates = gradients[0][0][r][threadIdx.x], ups = gradients[0][1][r][threadIdx.x];
    float weight_grad = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SwigluGradients result = storage.template differentiate_octet<kFused, kWeighted>(r, half, gates, ups);
      gradients[0][half][r][threadIdx.x] = result.gate.words;
      gradients[1][half][r][threadIdx.x] = result.up.words;
      if constexpr (kWithProduct) storage.product[half][r][threadIdx.x] = result.product.words;
      weight_grad += result.weight;
      __syncwarp();  // keeps the halves apart, which need too many registers together
    }
    if (kWeighted) write_weight_grad<8>(params, place, wide_row(threadIdx.x) + r, weight_grad);
  }
}

__device__ __forceinline__ void load_wide(WideOctets& octets, const WideSlots (&halves)[2]) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) octets[r][half].words = halves[half][r][threadIdx.x];
  }
}

template <bool kWithProduct>
__device__ __forceinline__ void write_wide_gradients(const SwigluBackwardParams& params, TilePlace place,
                                                     WideBackwardStorage<kWithProduct>& storage) {
  WideOctets octets;
#pragma unroll 1  // one code for both gradients
  for (int part = 0; part < 2; ++part) {
    load_wide(octets, storage.gradients[part]);
    write_wide_tile<true>(params.out, place, octets, storage.tile(), storage.columns);
    place.first_column += params.in.hidden;
  }
  if constexpr (kWithProduct) {
    place.first_column -= 2 * params.in.hidden;
    load_wide(octets, storage.product);
    write_wide_tile<false>(product_output(params), place, octets, storage.tile(), storage.columns);
  }
}

template <bool kWithProduct, bool kWeighted>
__global__ void __launch_bounds__(kWideThreads, kWithProduct ? 2 : 3)
    swiglu_fp8_backward_kernel(const SwigluBackwardParams params) {
  extern __shared__ uint4 dynamic_storage[];
  auto& storage = *reinterpret_cast<WideBackwardStorage<kWithProduct>*>(dynamic_storage);
  const TilePlace place = tile_of_block(params.groups, params.out.num_rows);
  if (place.rows.written == 0) return;  // past the last group
  storage.copy_inputs(params, place);
  if (storage.template fuse_factors<kWeighted>(place)) {
    differentiate_wide<true, kWithProduct, kWeighted>(params, place, storage);
  } else {
    differentiate_wide<false, kWithProduct, kWeighted>(params, place, storage);
  }
  write_wide_gradients<kWithProduct>(params, place, storage);
}

}  // namespace dsv3rt
