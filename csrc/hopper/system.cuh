// Accesses that other GPUs and the host see, and the clock that they share.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
#pragma once

#include <cstdint>

namespace dsv3rt {

// ld.acquire.sys
__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* pointer) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
  return value;
}

// st.release.sys
__device__ __forceinline__ void store_release_system(uint64_t* pointer, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

// %globaltimer
__device__ __forceinline__ uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace dsv3rt
