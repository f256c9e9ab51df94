// Zeros for the counters of a kernel that starts beside this one and waits for it before it counts
// (launch_early, wait_for_prior_grid).
#pragma once

#include "hopper/barrier.cuh"

namespace dsv3rt {

constexpr int kClearThreads = 512;

template <typename Integer>
__global__ void __launch_bounds__(kClearThreads) clear_kernel(Integer* counters, int count) {
  let_next_grid_start();
  for (int i = threadIdx.x; i < count; i += kClearThreads) counters[i] = 0;
}

}  // namespace dsv3rt
