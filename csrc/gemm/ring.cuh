// The ring of stages between producers and consumers.
#pragma once

#include <cstdint>

namespace dsv3rt {

// Position in the ring; the parity flips at every wrap.
template <int kStages>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dsv3rt
