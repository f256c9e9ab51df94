// SwiGLU backward from FP8: sixteen columns of four rows a thread.
#pragma once

#include "quant/swiglu_backward.cuh"
#include "quant/wide_tile.cuh"

namespace dsv3rt {

// What a block keeps in shared memory. Each thread copies the elements that it will read itself, and eight lanes share
// the factors of their four rows, so that no barrier is needed before the results are there. Those take the place of
// the inputs: the gradient of gate that of `gate` and `up`, the gradient of up that of `grad`. Once the gradient of
// gate is in registers, the transposed tile takes its place.
struct WideBackwardInputs {
  using Slots = uint4[kRowsPerThread][kWideThreads];
  Slots grad[2], gate, up;
  float gate_scale[kTile], up_scale[kTile], weight[kTile];
  WideColumnScales columns;

  __device__ __forceinline__ void copy_inputs(const SwigluBackwardParams& params, const TilePlace& place) {
    const int row_in_tile = wide_row(threadIdx.x), rows_to_read = place.rows.read - row_in_tile;
    const int64_t row = place.first_row + row_in_tile;
    const int column = place.first_column + wide_column(threadIdx.x);
    const auto* in = static_cast<const uint8_t*>(params.in.data) + row * params.in.stride + column;
    const auto* dy = static_cast<const __nv_bfloat16*>(params.grad) + row * params.grad_stride + column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      copy_async<16>(&gate[r][threadIdx.x], in, r < rows_to_read);
      copy_async<16>(&up[r][threadIdx.x], in + params.in.hidden, r < rows_to_read);
      copy_async<16>(&grad[0][r][threadIdx.x], dy, r < rows_to_read);
      copy_async<16>(&grad[1][r][threadIdx.x], dy + 8, r < rows_to_read);
      in += params.in.stride;
      dy += params.grad_stride;
    }
    copy_factors(params.in, place);
    copy_async_commit();
  }

  // Lanes 0 to 3 of eight copy the scales of the gates and the row weights, the others the scales of the ups.
  __device__ __forceinline__ void copy_factors(const GateUpInput& in, const TilePlace& place) {
    const int row = wide_row(threadIdx.x) + threadIdx.x % kRowsPerThread, tile = place.first_column / kTile;
    const bool valid = row < place.rows.read, of_gate = threadIdx.x % 8 < kRowsPerThread;
    const float* scale = in.scale + place.first_row + row;
    if (of_gate) {
      copy_async<4>(&gate_scale[row], scale + tile * in.scale_stride, valid);
      if (in.weight != nullptr) copy_async<4>(&weight[row], in.weight + place.first_row + row, valid);
    } else {
      copy_async<4>(&up_scale[row], scale + (in.hidden / kTile + tile) * in.scale_stride, valid);
    }
  }

  __device__ __forceinline__ GateUp<__nv_fp8_e4m3> gate_up(int r, int half) const {
    GateUp<__nv_fp8_e4m3> result;
    const int row = wide_row(threadIdx.x) + r;
    result.set(reinterpret_cast<const uint2*>(&gate[r][threadIdx.x])[half],
               reinterpret_cast<const uint2*>(&up[r][threadIdx.x])[half], gate_scale[row], up_scale[row]);
    return result;
  }

  __device__ __forceinline__ TransposedTile& tile() { return reinterpret_cast<TransposedTile&>(gate); }
};

template <bool kWithProduct>
struct WideBackwardStorage : WideBackwardInputs {
  Slots product[kWithProduct ? 2 : 0];
};

// Row by row, as in differentiate_tile.
template <bool kWithProduct, bool kWeighted>
__device__ __forceinline__ void differentiate_wide(const SwigluBackwardParams& params, const TilePlace& place,
                                                   WideBackwardStorage<kWithProduct>& storage) {
#pragma unroll 1
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row = wide_row(threadIdx.x) + r;
    const float weight = kWeighted ? storage.weight[row] : 1.0f;
    const bool bounded = __all_sync(~0u, scale_bounds_gates(storage.gate_scale[row]));
    float weight_grad = 0.0f;
    uint4 gate_gradients[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4& slot = storage.grad[half][r][threadIdx.x];
      const GateUp<__nv_fp8_e4m3> in = storage.gate_up(r, half);
      const SwigluGradients result = bounded ? differentiate<true, kWeighted>(in, {slot}, weight)
                                             : differentiate<false, kWeighted>(in, {slot}, weight);
      gate_gradients[half] = result.gate.words;
      slot = result.up.words;
      if constexpr (kWithProduct) storage.product[half][r][threadIdx.x] = result.product.words;
      weight_grad += result.weight;
      __syncwarp();  // keeps the halves apart, which need too many registers together
    }
    storage.gate[r][threadIdx.x] = gate_gradients[0];
    storage.up[r][threadIdx.x] = gate_gradients[1];
    if (kWeighted) write_weight_grad<8>(params, place, row, weight_grad);
  }
}

__device__ __forceinline__ void load_wide(WideOctets& octets, const WideBackwardInputs::Slots& first,
                                          const WideBackwardInputs::Slots& second) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    octets[r][0].words = first[r][threadIdx.x];
    octets[r][1].words = second[r][threadIdx.x];
  }
}

template <bool kWithProduct>
__device__ __forceinline__ void write_wide_gradients(const SwigluBackwardParams& params, TilePlace place,
                                                     WideBackwardStorage<kWithProduct>& storage) {
  WideOctets octets;
#pragma unroll 1  // one code for both gradients
  for (int part = 0; part < 2; ++part) {
    load_wide(octets, part == 0 ? storage.gate : storage.grad[0], part == 0 ? storage.up : storage.grad[1]);
    write_wide_tile<true, false>(params.out, place, octets, storage.tile(), storage.columns);
    place.first_column += params.in.hidden;
  }
  if constexpr (kWithProduct) {
    const QuantOutput out = product_output(params);
    place.first_column -= 2 * params.in.hidden;
    load_wide(octets, storage.product[0], storage.product[1]);
    write_wide_tile<false, false>(out, place, octets, storage.tile(), storage.columns);
  }
}

template <bool kWithProduct, bool kWeighted>
__global__ void __launch_bounds__(kWideThreads, kWithProduct ? 2 : 3)
    swiglu_fp8_backward_kernel(const SwigluBackwardParams params) {
  extern __shared__ uint4 dynamic_storage[];
  auto& storage = *reinterpret_cast<WideBackwardStorage<kWithProduct>*>(dynamic_storage);
  const TilePlace place = tile_of_block(params.groups, params.out.num_rows, params.in.hidden);
  if (place.rows.written == 0) return;  // past the last group
  storage.copy_inputs(params, place);
  copy_async_wait<0>();
  __syncwarp();

  differentiate_wide<kWithProduct, kWeighted>(params, place, storage);
  write_wide_gradients<kWithProduct>(params, place, storage);
}

}  // namespace dsv3rt
