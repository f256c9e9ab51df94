// Arithmetic instructions that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rcp
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
#pragma once

namespace dsv3rt {

// rcp.approx.ftz.f32: within 1 ulp
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ex2.approx.ftz.f32: 2^x within 2 ulp; results under 2^-126 are zero
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// threadIdx.x, read where it stands: what follows from it is not kept in registers through a loop around.
__device__ __forceinline__ int thread_idx_read_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

}  // namespace dsv3rt
