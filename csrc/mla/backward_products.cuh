// What both kernels of the backward pass sum with: blocks of 64 x 64, packed, times rows.
#pragma once

#include "hopper/fragment.cuh"
#include "hopper/wgmma.cuh"
#include "hopper/wgmma_bf16.cuh"
#include "mla/backward_storage.cuh"

namespace dsv3rt {

using PackedBlock = uint32_t[4][4];  // 64 x 64, a register operand along its columns

__device__ __forceinline__ void pack_block(PackedBlock& packed, const float (&block)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) packed[i / 4][i % 4] = pack_bf16(block[2 * i], block[2 * i + 1]);
}

// sums (64, columns) += weights (64, 64) times an operand that lies as (64, columns), slab by slab.
template <int kColumns>
__device__ __forceinline__ void accumulate_rows(float (&sums)[kColumns / 2], const PackedBlock& weights,
                                                const Slab64 (&operand)[kColumns / kSlab]) {
  constexpr int kStep = 128;  // of a descriptor: 16 rows along k of an MN-major operand
  const uint64_t descriptor = mn_major_swizzle128_descriptor(operand[0], sizeof(Slab64));
  pin_registers(sums);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WgmmaBF16<kColumns, Major::kMN>::multiply(sums, weights[step], descriptor + step * kStep, true);
  }
  wgmma_commit();
  pin_registers(sums);
}

}  // namespace dsv3rt
