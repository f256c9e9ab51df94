// The ring of stages between producers and consumers.
#pragma once

#include <cstdint>

namespace dsv3rt {

// Position in the ring. The parity is of the phase in which the stage is filled, that in which it is empty has the
// other; it flips at every wrap.
template <int kStages>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t stage_before() const { return stage == 0 ? kStages - 1 : stage - 1; }

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dsv3rt
