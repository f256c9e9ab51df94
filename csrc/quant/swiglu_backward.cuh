// SwiGLU backward from BF16: gradients of gate and up in FP8 by rows and by columns, from one read of their inputs; on
// request the product again, by columns, and the gradient of the row weights.
#pragma once

#include "hopper/memory.cuh"
#include "quant/swiglu.cuh"

namespace dsv3rt {

struct ElementGradients {
  float gate, up, product;
};

// Eight elements of each result, and their part in the gradient of the row's weight.
struct SwigluGradients {
  Octet<__nv_bfloat16> gate, up, product;
  float weight;
};

// element(i): the i-th of the eight.
template <class Element>
__device__ __forceinline__ SwigluGradients pack_gradients(Element element) {
  uint32_t gate[4], up[4], product[4];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    const ElementGradients first = element(2 * pair), second = element(2 * pair + 1);
    gate[pair] = pack_bf16(first.gate, second.gate);
    up[pair] = pack_bf16(first.up, second.up);
    product[pair] = pack_bf16(first.product, second.product);
  }
  return {{make_uint4(gate[0], gate[1], gate[2], gate[3])},
          {make_uint4(up[0], up[1], up[2], up[3])},
          {make_uint4(product[0], product[1], product[2], product[3])},
          0.0f};
}

template <bool kWeighted, typename Type>
__device__ __forceinline__ SwigluGradients differentiate(const GateUp<Type>& in, const Octet<__nv_bfloat16>& grad,
                                                         float weight) {
  float gates[8], ups[8], weight_grad = 0.0f;
  in.unpack(gates, ups);
  SwigluGradients result = pack_gradients([&](int i) {
    const float gate = gates[i], up = ups[i], dy = grad.get(i);
    const Activation a = activate(gate);
    const float plain = __fmul_rn(a.silu, up), weighted = kWeighted ? __fmul_rn(dy, weight) : dy;
    // silu' = sigmoid (1 + gate (1 - sigmoid))
    const float slope = __fmul_rn(a.sigmoid, __fadd_rn(1.0f, __fmul_rn(gate, __fsub_rn(1.0f, a.sigmoid))));
    ElementGradients element;
    element.product = kWeighted ? __fmul_rn(plain, weight) : plain;
    element.up = __fmul_rn(weighted, a.silu);
    element.gate = __fmul_rn(__fmul_rn(weighted, up), slope);
    if (kWeighted) weight_grad += dy * plain;
    return element;
  });
  result.weight = weight_grad;
  return result;
}

// What a block keeps in shared memory. Each thread copies the elements that it will read itself, eight to a slot, and
// sixteen lanes share the weights of their four rows, so that no barrier is needed before the results are there. Those
// take the place of the inputs: the gradient of gate that of `up`, the gradient of up that of `grad`, the product that
// of `gate`. Once the gradient of gate is in registers, the transposed tile takes its place.
struct BackwardStorage {
  using Slots = uint4[kRowsPerThread][kTileThreads];
  Slots grad, gate, up;
  float weight[kTile];
  ColumnScales<__nv_bfloat16> columns;

  __device__ __forceinline__ void copy_inputs(const SwigluBackwardParams& params, const TilePlace& place) {
    const int64_t row = place.first_row + row_in_tile();
    const int column = place.first_column + column_in_tile(), rows_to_read = place.rows_to_read();
    const auto* in = static_cast<const __nv_bfloat16*>(params.in.data) + row * params.in.stride + column;
    const auto* dy = static_cast<const __nv_bfloat16*>(params.grad) + row * params.grad_stride + column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      copy_async<16>(&gate[r][threadIdx.x], in, r < rows_to_read);
      copy_async<16>(&up[r][threadIdx.x], in + params.in.hidden, r < rows_to_read);
      copy_async<16>(&grad[r][threadIdx.x], dy, r < rows_to_read);
      in += params.in.stride;
      dy += params.grad_stride;
    }
    const int weight_row = row_in_tile() + threadIdx.x % 4;
    if (params.in.weight != nullptr && threadIdx.x % 16 / 4 == 2) {
      copy_async<4>(&weight[weight_row], params.in.weight + place.first_row + weight_row, weight_row < place.rows.read);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ GateUp<__nv_bfloat16> gate_up(int r) const {
    return {{gate[r][threadIdx.x]}, {up[r][threadIdx.x]}};
  }

  __device__ __forceinline__ TransposedTile& tile() { return reinterpret_cast<TransposedTile&>(up); }
};

__device__ __forceinline__ void load_slots(TileOctets<__nv_bfloat16>& octets,
                                           const uint4 (&slots)[kRowsPerThread][kTileThreads]) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) octets[r].words = slots[r][threadIdx.x];
}

// The sum of 128 columns of row `row` of the tile, which kLanes lanes share, into the row of this column tile.
template <int kLanes>
__device__ __forceinline__ void write_weight_grad(const SwigluBackwardParams& params, const TilePlace& place, int row,
                                                  float sum) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % kLanes == 0 && row < place.rows.written) {
    params.weight_grad[place.first_column / kTile * params.out.num_rows + place.first_row + row] = sum;
  }
}

// Results take the place of the inputs. Row by row: four at once need more registers than there are.
template <bool kWithProduct, bool kWeighted>
__device__ __forceinline__ void differentiate_tile(const SwigluBackwardParams& params, const TilePlace& place,
                                                   BackwardStorage& storage) {
#pragma unroll 1
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row = row_in_tile() + r;
    const float weight = kWeighted ? storage.weight[row] : 1.0f;
    const SwigluGradients gradients =
        differentiate<kWeighted>(storage.gate_up(r), {storage.grad[r][threadIdx.x]}, weight);
    storage.up[r][threadIdx.x] = gradients.gate.words;
    storage.grad[r][threadIdx.x] = gradients.up.words;
    if (kWithProduct) storage.gate[r][threadIdx.x] = gradients.product.words;
    if (kWeighted) write_weight_grad<16>(params, place, row, gradients.weight);
  }
}

// Where the product goes, by columns alone.
__device__ __forceinline__ QuantOutput product_output(const SwigluBackwardParams& params) {
  QuantOutput out = params.out;
  out.data_t = params.output_t;
  out.scale_t = params.output_scale_t;
  out.scale_t_stride = params.output_scale_t_stride;
  return out;
}

// A block takes a 128x128 tile of gate, up and gradient; while it waits for them another one computes.
template <bool kWithProduct, bool kWeighted>
__global__ void __launch_bounds__(kTileThreads, 2) swiglu_backward_kernel(const SwigluBackwardParams params) {
  using BFloat16 = __nv_bfloat16;
  extern __shared__ uint4 dynamic_storage[];
  auto& storage = *reinterpret_cast<BackwardStorage*>(dynamic_storage);
  TilePlace place = tile_of_block(params.groups, params.out.num_rows);
  if (place.rows.written == 0) return;  // past the last group
  storage.copy_inputs(params, place);
  copy_async_wait<0>();
  __syncwarp();

  differentiate_tile<kWithProduct, kWeighted>(params, place, storage);
  TileOctets<BFloat16> octets;
  load_slots(octets, storage.up);
  write_tile<BFloat16>(params.out, place, octets, storage.tile(), storage.columns);
  if (kWithProduct) {
    load_slots(octets, storage.gate);
    write_tile_columns<BFloat16>(product_output(params), place, octets, storage.tile(), storage.columns);
  }
  place.first_column += params.in.hidden;
  load_slots(octets, storage.grad);
  write_tile<BFloat16>(params.out, place, octets, storage.tile(), storage.columns);
}

}  // namespace dsv3rt
