// Shared memory by address.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv3rt {

// stmatrix.x4: four 8x8 matrices of 16-bit numbers; lane l names the 16-byte row l % 8 of matrix l / 8. A thread's
// words are laid out as in the accumulators of wgmma.
__device__ __forceinline__ void store_matrices(uint32_t shared_address, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ldmatrix.x4: the same in the other direction
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address)
               : "memory");
}

// ldmatrix.x4.trans: the same, of the transposed matrices
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address)
               : "memory");
}

// ld.shared and st.shared by address
__device__ __forceinline__ float load_shared(uint32_t shared_address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(shared_address) : "memory");
  return value;
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t shared_address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(shared_address) : "memory");
  return value;
}

__device__ __forceinline__ float4 load_shared_quad(uint32_t shared_address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(shared_address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_pair(uint32_t shared_address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void store_shared_quad(uint32_t shared_address, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}

// mapa + st.shared::cluster: the same address of another CTA of the cluster
__device__ __forceinline__ void store_cluster_quad(uint32_t shared_address, uint32_t cta_rank, const float* values) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n}" ::"r"(shared_address),
      "r"(cta_rank), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
      : "memory");
}

__device__ __forceinline__ void store_shared_pair(uint32_t shared_address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared_address), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void store_shared_quad(uint32_t shared_address, const uint4& words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

}  // namespace dsv3rt
