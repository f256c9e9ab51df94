// Global-memory accesses that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
#pragma once

#include <cstdint>

#include "hopper/barrier.cuh"

namespace dsv3rt {

// cp.async: global -> shared without passing through registers; zeros where not `valid`. kBytes: 4, 8 or 16.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* target, const void* source, bool valid) {
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // only these can pass by the L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(target)), "l"(source),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(target)), "l"(source), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ld.acquire and st.release between blocks of one GPU
__device__ __forceinline__ int load_acquire(const int* pointer) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* pointer, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

// red.add and st of four neighbouring numbers, 16-byte aligned
__device__ __forceinline__ void add_global_quad(float* target, const float (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

__device__ __forceinline__ void store_global_quad(float* target, const float (&values)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(values[0]), "f"(values[1]), "f"(values[2]),
               "f"(values[3])
               : "memory");
}

}  // namespace dsv3rt
