// Positions in rings of shared memory, and the parities of the barriers that guard them.
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

// The same of any number of stages.
template <int kStages>
struct RingOf {
  int stage = 0;
  uint32_t parity = 0;  // of the phase in which the stage is filled; that in which it is empty has the other

  __device__ __forceinline__ int stage_before() const { return stage == 0 ? kStages - 1 : stage - 1; }

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dsv3rt
