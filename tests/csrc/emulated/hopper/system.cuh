// What csrc/hopper/system.cuh is on a GPU, for threads of the host.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "cuda_on_host.h"

namespace dsv3rt {

inline uint64_t load_acquire_system(const uint64_t* pointer) {
  host::step();
  return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(pointer)).load(std::memory_order_acquire);
}

inline void store_release_system(uint64_t* pointer, uint64_t value) {
  std::atomic_ref<uint64_t>(*pointer).store(value, std::memory_order_release);
}

inline uint64_t clock_ns() { return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count()); }

}  // namespace dsv3rt
