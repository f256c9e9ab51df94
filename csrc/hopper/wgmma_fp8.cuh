// wgmma.mma_async m64nNk32, E4M3 x E4M3 into FP32, both operands from shared memory, K-major. D = A B^T (+ D).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
//
// Thread t of the warpgroup holds, of row 16 (t / 32) + t % 32 / 4 (+ 8 for the second pair), columns 8i + 2 (t % 4)
// and the next: d[4i], d[4i + 1], and of the row 8 below d[4i + 2], d[4i + 3].
#pragma once

#include <cstdint>

namespace dsv3rt {

template <int kN>
struct WgmmaE4M3;

// clang-format off
#define DSV3RT_D8(b) "+f"(d[b]), "+f"(d[b + 1]), "+f"(d[b + 2]), "+f"(d[b + 3]), "+f"(d[b + 4]), "+f"(d[b + 5]), "+f"(d[b + 6]), "+f"(d[b + 7])

template <>
struct WgmmaE4M3<64> {
  static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }
};

template <>
struct WgmmaE4M3<128> {
  static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24), DSV3RT_D8(32), DSV3RT_D8(40), DSV3RT_D8(48), DSV3RT_D8(56)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }
};

template <>
struct WgmmaE4M3<192> {
  static __device__ __forceinline__ void multiply(float (&d)[96], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, p, 1, 1;\n}"
        : DSV3RT_D8(0), DSV3RT_D8(8), DSV3RT_D8(16), DSV3RT_D8(24), DSV3RT_D8(32), DSV3RT_D8(40), DSV3RT_D8(48), DSV3RT_D8(56), DSV3RT_D8(64), DSV3RT_D8(72), DSV3RT_D8(80), DSV3RT_D8(88)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  }
};

#undef DSV3RT_D8
// clang-format on

}  // namespace dsv3rt
