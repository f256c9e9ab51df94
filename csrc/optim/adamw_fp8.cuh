// adamw_step that writes the new weights in FP8, in 128x128 tiles and both orientations: a block for each tile.
#pragma once

#include "common/fp8_tile.cuh"
#include "optim/adamw.cuh"

namespace dsv3rt {

// New weights wait here for the tile's scale, a slot for each thread and row; afterwards it is the transposed tile.
struct AdamWTileStorage {
  alignas(16) Octet<__nv_bfloat16> weights[kRowsPerThread][kTileThreads];
  uint32_t warp_amax[kTileWarps];

  __device__ __forceinline__ TransposedTile& tile() { return reinterpret_cast<TransposedTile&>(weights); }
};

// Updates eight elements of a row, as far as they exist, and returns the new weights in BF16; zeros for the rest.
template <bool kVectorised, typename Grad, typename Moment>
__device__ __forceinline__ Octet<__nv_bfloat16> update_octet(const AdamWState<Grad, Moment>& at,
                                                             const AdamWStep<Moment>& step, int64_t element,
                                                             int columns_left) {
  AdamWOctet octet = {};
  if (kVectorised) {
    if (columns_left > 0) {
      at.load(element, octet);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        step.update(element + j, octet.grad[j], octet.master[j], octet.m[j], octet.v[j]);
      }
      at.store(element, octet);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (j < columns_left) octet.master[j] = at.update_one(step, element + j);
    }
  }
  return round_octet(octet.master);
}

template <bool kVectorised, typename Grad, typename Moment>
__device__ __forceinline__ void update_tile(const AdamWFp8Tensor& tensor, const AdamWStep<Moment>& step,
                                            const BatchTile& place, AdamWTileStorage& storage) {
  const AdamWState<Grad, Moment> at(tensor.master, tensor.grad, tensor.m, tensor.v);
  const int row = place.first_row() + row_in_tile(), column = place.first_column() + column_in_tile();
  const int64_t first = (int64_t(place.matrix) * place.num_rows + row) * place.num_columns + column;

  uint32_t amax = 0;
#pragma unroll 1
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int64_t element = first + int64_t(r) * place.num_columns;
    const auto weights = update_octet<kVectorised>(at, step, element, place.columns_left(row + r, column));
    storage.weights[r][threadIdx.x] = weights;
    amax = max(amax, weights.amax_bits());
  }
  const TileScale scale = tile_scale(tile_amax(amax, storage.warp_amax), 0);
  if (threadIdx.x == 0) {
    tensor.scale[place.scale_place()] = scale.scale;
    if (tensor.data_t != nullptr) tensor.scale_t[place.transposed_scale_place(tensor.scale_t_stride)] = scale.scale;
  }

  uint2 codes[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    codes[r] = quantize_octet(storage.weights[r][threadIdx.x], scale.inverse);
    uint8_t* target = tensor.data + first + int64_t(r) * place.num_columns;
    write_bytes<kVectorised>(target, codes[r], place.columns_left(row + r, column));
  }
  if (tensor.data_t != nullptr) {
    __syncthreads();  // all have read their weights
    write_transposed<kVectorised>(tensor.data_t, tensor.data_t_stride, place, codes, storage.tile());
  }
}

template <typename Grad, typename Moment>
__global__ void __launch_bounds__(kTileThreads, 2) adamw_fp8_kernel(const __grid_constant__ AdamWFp8Params params) {
  __shared__ AdamWTileStorage storage;
  const int index = tensor_of_block(params.first_block, params.num_tensors);
  const AdamWFp8Tensor& tensor = params.tensors[index];
  const AdamWStep<Moment> step{params.numbers, params.grad_scale == nullptr ? 1.0f : *params.grad_scale,
                               params.stochastic, tensor.key};
  const BatchTile place(blockIdx.x - params.first_block[index], tensor.num_rows, tensor.num_columns);
  if (tensor.vectorised) {
    update_tile<true, Grad>(tensor, step, place, storage);
  } else {
    update_tile<false, Grad>(tensor, step, place, storage);
  }
}

}  // namespace dsv3rt
