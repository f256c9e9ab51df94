// Arithmetic instructions that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rcp
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
// https://docs.nvidia.com/cuda/parallel-thread-execution/#logic-and-shift-instructions-lop3
#pragma once

namespace dsv3rt {

// lop3 that changes nothing: a copy that ptxas does not merge with its source. Values stored four at a time need
// aligned registers; stored by way of a copy, they may live anywhere.
__device__ __forceinline__ float separate_copy(float x) {
  float result;
  asm volatile("lop3.b32 %0, %1, 0, 0, 0xfc;" : "=f"(result) : "f"(x));
  return result;
}

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
