// Global-memory accesses that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-red
#pragma once

namespace dsv3rt {

// red.global.add.v2.f32: adds without reading back; 8-byte aligned
__device__ __forceinline__ void add_to_global(float* target, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(x), "f"(y) : "memory");
}

}  // namespace dsv3rt
