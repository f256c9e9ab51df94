// Shared-memory accesses that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
#pragma once

#include <cstdint>

#include "hopper/barrier.cuh"

namespace dsv3rt {

// stmatrix .x4: four 8x8 matrices of 16-bit elements in accumulator layout. Lane l names the address (16-byte aligned)
// of row l % 8 of matrix l / 8; word i of every lane belongs to matrix i.
__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

}  // namespace dsv3rt
