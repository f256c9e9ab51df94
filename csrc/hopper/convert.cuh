// Conversions between number formats that C++ has no word for.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cvt
#pragma once

#include <cstdint>

namespace dsv3rt {

struct HalfPairs {
  uint32_t lower, upper;  // of bytes 0 and 1, of bytes 2 and 3
};

// cvt.rn.f16x2.e4m3x2, twice: four E4M3 numbers as F16, exactly. Halves of a register need no move of their own.
__device__ __forceinline__ HalfPairs widen_e4m3(uint32_t bytes) {
  HalfPairs pairs;
  asm("{\n.reg .b16 lower, upper;\n"
      "mov.b32 {lower, upper}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, lower;\n"
      "cvt.rn.f16x2.e4m3x2 %1, upper;\n}"
      : "=r"(pairs.lower), "=r"(pairs.upper)
      : "r"(bytes));
  return pairs;
}

}  // namespace dsv3rt
