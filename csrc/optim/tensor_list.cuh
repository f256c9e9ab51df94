// How a launch's blocks share out a list of tensors.
#pragma once

#include "common/math.h"
#include "optim/params.h"

namespace dsv3rt {

// Fills in where each tensor's blocks begin and returns their number; blocks_of(tensor) says how many one has.
template <typename Tensor, class BlocksOf>
int64_t share_out(const Tensor* tensors, int num_tensors, int* first_block, BlocksOf blocks_of) {
  int64_t blocks = 0;
  for (int i = 0; i < num_tensors; ++i) {
    first_block[i] = static_cast<int>(blocks);
    blocks += blocks_of(tensors[i]);
  }
  first_block[num_tensors] = static_cast<int>(blocks);
  return blocks;
}

// Blocks of so many elements each.
template <typename Tensor>
int64_t share_out(const Tensor* tensors, int num_tensors, int block_elements, int* first_block) {
  return share_out(tensors, num_tensors, first_block,
                   [&](const Tensor& one) { return ceil_div(one.num_elements, int64_t(block_elements)); });
}

// The tensor that this block is for: the last one whose first block is not after it. Empty tensors have no block.
__device__ __forceinline__ int tensor_of_block(const int* first_block, int num_tensors) {
  int low = 0, high = num_tensors;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_block[middle] <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace dsv3rt
