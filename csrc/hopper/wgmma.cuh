// Warpgroup matrix multiply: descriptors and ordering. The instructions themselves: wgmma_fp8.cuh.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include <cstdint>

#include "hopper/barrier.cuh"

namespace dsv3rt {

// Matrix descriptor of a K-major operand in 128-byte swizzle: rows of 128 bytes, atoms of 8 rows (1024 bytes) one after
// another, base aligned to 1024 bytes. Only its low word depends on the address: 16 bytes add one, so that a step of 32
// bytes along K adds 2.
__device__ __forceinline__ uint32_t descriptor_base(uint32_t shared_address) { return (shared_address & 0x3ffff) >> 4; }

__device__ __forceinline__ uint64_t k_major_swizzle128_descriptor(uint32_t base) {
  constexpr uint64_t kStrideBytes = 1024, kSwizzle128 = 1;
  return base | (kStrideBytes >> 4) << 32 | kSwizzle128 << 62;
}

__device__ __forceinline__ uint64_t k_major_swizzle128_descriptor(const void* tile) {
  return k_major_swizzle128_descriptor(descriptor_base(smem_address(tile)));
}

// The same in 32-byte swizzle: rows of 32 bytes, one step of 16-bit numbers, atoms of 256 bytes, base aligned to those.
__device__ __forceinline__ uint64_t k_major_swizzle32_descriptor(const void* tile) {
  constexpr uint64_t kStrideBytes = 256, kSwizzle32 = 3;
  return descriptor_base(smem_address(tile)) | (kStrideBytes >> 4) << 32 | kSwizzle32 << 62;
}

// wgmma.fence: before the first wgmma, and after any other write to its registers
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins accumulators: the compiler moves no access to them across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

}  // namespace dsv3rt
