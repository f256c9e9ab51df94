// Arithmetic instructions that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rcp-approx-ftz-f64
#pragma once

namespace dsv3rt {

// rcp.approx.ftz.f32: within 1 ulp
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace dsv3rt
