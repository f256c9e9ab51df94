// What csrc/hopper/barrier.cuh is on a GPU, for threads of the host: barriers that count bytes of bulk copies.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "cuda_on_host.h"

namespace dsv3rt {

class Barrier {
 public:
  void init(uint32_t) { *this = {}; }

  void arrive_and_expect(uint32_t bytes) {
    if (expected_ != 0) misused("expects bytes again before those of before have come");
    expected_ = bytes;
  }

  void bring(void* target, const void* source, uint32_t bytes) {
    if (expected_ != bytes) misused("does not expect what comes");
    target_ = target, source_ = source;
  }

  // The copy itself, as late as it may be.
  void wait(uint32_t parity) {
    if (expected_ == 0 || parity != phase_ % 2) misused("is awaited in the wrong phase");
    host::step();
    std::memcpy(target_, source_, expected_);
    expected_ = 0, ++phase_;
  }

 private:
  [[noreturn]] static void misused(const char* how) {
    std::printf("a barrier %s\n", how);
    std::exit(1);
  }

  uint32_t expected_ = 0, phase_ = 0;
  void* target_ = nullptr;
  const void* source_ = nullptr;
};

inline void fence_barrier_init() {}

}  // namespace dsv3rt
