// SwiGLU backward: gradients of gate and up in FP8 by rows and by columns, from one read of their inputs; on request
// the product again, by columns, and the gradient of the row weights.
#pragma once

#include <type_traits>

#include "hopper/memory.cuh"
#include "quant/swiglu.cuh"

namespace dsv3rt {

// Eight elements of each result, and their part in the gradient of the row's weight.
struct SwigluGradients {
  Octet<__nv_bfloat16> gate, up, product;
  float weight;
};

template <bool kWeighted, typename Type>
__device__ __forceinline__ SwigluGradients differentiate(const GateUp<Type>& in, const Octet<__nv_bfloat16>& grad,
                                                         float weight) {
  float gates[8], ups[8];
  in.unpack(gates, ups);
  uint32_t gate_words[4], up_words[4], product_words[4];
  float weight_grad = 0.0f;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float d_gate[2], d_up[2], product[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float gate = gates[2 * pair + i], up = ups[2 * pair + i], dy = grad.get(2 * pair + i);
      const Activation a = activate(gate);
      const float plain = __fmul_rn(a.silu, up), weighted = kWeighted ? __fmul_rn(dy, weight) : dy;
      // silu' = sigmoid (1 + gate (1 - sigmoid))
      const float slope = __fmul_rn(a.sigmoid, __fadd_rn(1.0f, __fmul_rn(gate, __fsub_rn(1.0f, a.sigmoid))));
      product[i] = kWeighted ? __fmul_rn(plain, weight) : plain;
      d_up[i] = __fmul_rn(weighted, a.silu);
      d_gate[i] = __fmul_rn(__fmul_rn(weighted, up), slope);
      if (kWeighted) weight_grad += dy * plain;
    }
    gate_words[pair] = pack_bf16(d_gate[0], d_gate[1]);
    up_words[pair] = pack_bf16(d_up[0], d_up[1]);
    product_words[pair] = pack_bf16(product[0], product[1]);
  }
  return {{make_uint4(gate_words[0], gate_words[1], gate_words[2], gate_words[3])},
          {make_uint4(up_words[0], up_words[1], up_words[2], up_words[3])},
          {make_uint4(product_words[0], product_words[1], product_words[2], product_words[3])},
          weight_grad};
}

// Inputs of a tile on their way through shared memory. A thread copies the elements that it will read itself, and
// sixteen lanes share the factors of their four rows, so that no barrier is needed beyond the warp.
template <typename Type>
struct BackwardStage {
  using Words = std::conditional_t<sizeof(Type) == 2, uint4, uint2>;  // eight elements
  uint4 grad[kRowsPerThread][kTileThreads];
  Words gate[kRowsPerThread][kTileThreads], up[kRowsPerThread][kTileThreads];
  float gate_scale[kTile], up_scale[kTile], weight[kTile];

  __device__ __forceinline__ void copy(const SwigluBackwardParams& params, const TilePlace& place) {
    const int64_t row = place.first_row + row_in_tile();
    const int column = place.first_column + column_in_tile(), rows_to_read = place.rows_to_read();
    const auto* in = static_cast<const Type*>(params.in.data) + row * params.in.stride + column;
    const auto* dy = static_cast<const __nv_bfloat16*>(params.grad) + row * params.grad_stride + column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      copy_async<sizeof(Words)>(&gate[r][threadIdx.x], in, r < rows_to_read);
      copy_async<sizeof(Words)>(&up[r][threadIdx.x], in + params.in.hidden, r < rows_to_read);
      copy_async<16>(&grad[r][threadIdx.x], dy, r < rows_to_read);
      in += params.in.stride;
      dy += params.grad_stride;
    }
    copy_factors(params.in, place);
  }

  // Lanes 0 to 3 of sixteen copy the scales of the gates, the next four those of the ups, the next the row weights.
  __device__ __forceinline__ void copy_factors(const GateUpInput& in, const TilePlace& place) {
    const int kind = threadIdx.x % 16 / 4, row = row_in_tile() + threadIdx.x % 4;
    const bool valid = row < place.rows.read;
    const float* scale = in.scale + place.first_row + row;
    const int tile = place.first_column / kTile;
    if (sizeof(Type) == 1 && kind == 0) copy_async<4>(&gate_scale[row], scale + tile * in.scale_stride, valid);
    if (sizeof(Type) == 1 && kind == 1) {
      copy_async<4>(&up_scale[row], scale + (in.hidden / kTile + tile) * in.scale_stride, valid);
    }
    if (in.weight != nullptr && kind == 2) copy_async<4>(&weight[row], in.weight + place.first_row + row, valid);
  }

  __device__ __forceinline__ GateUp<Type> gate_up(int r) const {
    GateUp<Type> result;
    result.set(gate[r][threadIdx.x], up[r][threadIdx.x], gate_scale[row_in_tile() + r], up_scale[row_in_tile() + r]);
    return result;
  }
};

// Sums of each row's 128 columns, into the row of this column tile.
__device__ __forceinline__ void write_weight_grad(const SwigluBackwardParams& params, const TilePlace& place,
                                                  float (&sums)[kRowsPerThread]) {
  float* target =
      params.weight_grad + place.first_column / kTile * params.out.num_rows + place.first_row + row_in_tile();
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], distance);
    if (threadIdx.x % 16 == 0 && r < place.rows_to_write()) target[r] = sums[r];
  }
}

template <typename Type, bool kWithProduct, bool kWeighted>
__device__ __forceinline__ void differentiate_tile(const SwigluBackwardParams& params, TilePlace place,
                                                   const BackwardStage<Type>& stage,
                                                   TileStorage<__nv_bfloat16>& storage) {
  using BFloat16 = __nv_bfloat16;
  TileOctets<BFloat16> d_gate, d_up, product;
  float weight_sums[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const float weight = kWeighted ? stage.weight[row_in_tile() + r] : 1.0f;
    const SwigluGradients gradients = differentiate<kWeighted>(stage.gate_up(r), {stage.grad[r][threadIdx.x]}, weight);
    d_gate[r] = gradients.gate;
    d_up[r] = gradients.up;
    if (kWithProduct) product[r] = gradients.product;
    weight_sums[r] = gradients.weight;
  }
  if (kWeighted) write_weight_grad(params, place, weight_sums);
  write_tile_columns<BFloat16>(params.out, place, d_gate, storage);
  write_tile_rows<BFloat16>(params.out, place, d_gate);
  if (kWithProduct) {
    QuantOutput out = params.out;
    out.data_t = params.output_t;
    out.scale_t = params.output_scale_t;
    out.scale_t_stride = params.output_scale_t_stride;
    write_tile_columns<BFloat16>(out, place, product, storage);
  }
  place.first_column += params.in.hidden;
  write_tile_columns<BFloat16>(params.out, place, d_up, storage);
  write_tile_rows<BFloat16>(params.out, place, d_up);
}

template <typename Type>
struct BackwardStorage {
  BackwardStage<Type> stages[2];
  TileStorage<__nv_bfloat16> tile;
};

// Persistent: while a block works on the 128x128 tile of gate, up and gradient in one stage, the next one arrives in
// the other.
template <typename Type, bool kWithProduct, bool kWeighted>
__global__ void __launch_bounds__(kTileThreads, 1) swiglu_backward_kernel(const SwigluBackwardParams params) {
  extern __shared__ uint4 dynamic_storage[];
  auto& storage = *reinterpret_cast<BackwardStorage<Type>*>(dynamic_storage);
  const unsigned num_tiles = ceil_div(params.out.num_rows, int64_t(kTile)) * (params.in.hidden / kTile);
  const auto place_of = [&](unsigned tile) {
    const BlockPosition block(tile, params.in.hidden, kTile);
    return TilePlace{block.row * kTile, block.column * kTile,
                     count_rows(params.groups, block.row * kTile, params.out.num_rows, kTile)};
  };
  TilePlace place = place_of(blockIdx.x);
  storage.stages[0].copy(params, place);
  copy_async_commit();
  int current = 0;
  for (unsigned tile = blockIdx.x; tile < num_tiles; tile += gridDim.x, current ^= 1) {
    TilePlace next = place;
    if (tile + gridDim.x < num_tiles) {
      next = place_of(tile + gridDim.x);
      storage.stages[current ^ 1].copy(params, next);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncwarp();
    if (place.rows.written > 0) {  // else past the last group
      differentiate_tile<Type, kWithProduct, kWeighted>(params, place, storage.stages[current], storage.tile);
    }
    __syncwarp();
    place = next;
  }
}

}  // namespace dsv3rt
