// Position in a ring of two in shared memory, and the parities of the barriers that guard it.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int kTileSlots = 2;

// Position in a ring of two: which of both, and the parity of the phase in which it is filled.
struct TwoStage {
  int count = 0;

  __device__ __forceinline__ int stage() const { return count & 1; }
  __device__ __forceinline__ uint32_t full_parity() const { return count >> 1 & 1; }
  __device__ __forceinline__ uint32_t empty_parity() const { return full_parity() ^ 1; }  // passes at once at first
};

}  // namespace dsv3rt
