// wgmma.mma_async m64nNk16, BF16 x BF16 into FP32. D = A B^T (+ D), B (n, k) from shared memory; A (m, k) from
// registers or, K-major, from shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
//
// Thread t of the warpgroup holds, of row 16 (t / 32) + t % 32 / 4 (+ 8 for the second pair), columns 8i + 2 (t % 4)
// and the next: d[4i], d[4i + 1], and of the row 8 below d[4i + 2], d[4i + 3]. A fragment of A is the same map over 16
// columns, packed in pairs: so the eight accumulators d[8j] .. d[8j + 7] are, packed, the fragment of columns 16j.
#pragma once

#include <cstdint>

#include "hopper/barrier.cuh"

namespace dsv3rt {

// Which of B's two extents runs along the 128-byte rows of shared memory.
enum class Major : int { kK = 0, kMN = 1 };

// Matrix descriptor of an MN-major operand in 128-byte swizzle: slabs of 64 m or n, each a row of 128 bytes for every
// k, `slab_bytes` apart, bases aligned to 1024 bytes. A step of 16 along k adds 128.
__device__ __forceinline__ uint64_t mn_major_swizzle128_descriptor(const void* tile, uint32_t slab_bytes) {
  constexpr uint64_t kStrideBytes = 1024, kSwizzle128 = 1;  // the stride is that of 8 rows along k
  return (smem_address(tile) & 0x3ffff) >> 4 | uint64_t(slab_bytes >> 4) << 16 | (kStrideBytes >> 4) << 32 |
         kSwizzle128 << 62;
}

template <int kN, Major kMajorB>
struct WgmmaBF16;

// clang-format off
#define DSV3RT_D8(b) "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), "+f"(d[b + 5]), "+f"(d[b + 6]), "+f"(d[b + 7])

template <Major kMajorB>
struct WgmmaBF16<64, kMajorB> {
  static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, %35;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMajorB)));
  }

  static __device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMajorB)));
  }
};

template <Major kMajorB>
struct WgmmaBF16<128, kMajorB> {
  static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, %67;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24), DSV3RT_D8(32), DSV3RT_D8(40), DSV3RT_D8(48), DSV3RT_D8(56)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMajorB)));
  }

  static __device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24), DSV3RT_D8(32), DSV3RT_D8(40), DSV3RT_D8(48), DSV3RT_D8(56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMajorB)));
  }
};

template <Major kMajorB>
struct WgmmaBF16<192, kMajorB> {
  static __device__ __forceinline__ void multiply(float (&d)[96], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %101, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "{%96, %97, %98, %99}, %100, p, 1, 1, %102;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24), DSV3RT_D8(32), DSV3RT_D8(40), DSV3RT_D8(48), DSV3RT_D8(56), DSV3RT_D8(64), DSV3RT_D8(72), DSV3RT_D8(80), DSV3RT_D8(88)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kMajorB)));
  }
};

#undef DSV3RT_D8
// clang-format on

}  // namespace dsv3rt
