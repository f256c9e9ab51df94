// The bulk tensor copy engine.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-reduce-async-bulk-tensor
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-prefetch-prefetchu
#pragma once

#include <cuda.h>

#include <cstdint>

#include "hopper/barrier.cuh"

namespace dsv3rt {

// What the L2 does with the lines (the policies that createpolicy would make).
enum class L2Hint : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

// prefetch.tensormap
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// cp.async.bulk.tensor, global -> shared; bytes are counted on `barrier`. x is the innermost coordinate.
__device__ __forceinline__ void tma_load_2d(void* target, const CUtensorMap& map, Barrier& barrier, int x, int y,
                                            L2Hint hint = L2Hint::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// cp.async.bulk.tensor of a 4-dimensional box; x is the innermost coordinate.
__device__ __forceinline__ void tma_load_4d(void* target, const CUtensorMap& map, Barrier& barrier, int x, int y, int z,
                                            int w, L2Hint hint = L2Hint::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// cp.async.bulk: consecutive bytes, a multiple of 16, at addresses that are multiples of 16
__device__ __forceinline__ void bulk_load(void* target, const void* source, uint32_t bytes, Barrier& barrier,
                                          L2Hint hint = L2Hint::kNormal) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(smem_address(target)),
      "l"(source), "r"(bytes), "r"(smem_address(&barrier)), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// cp.async.bulk.prefetch: consecutive bytes into the L2, a multiple of 16, from an address that is one
__device__ __forceinline__ void bulk_prefetch(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// As tma_load_2d, into every CTA of the cluster named in `cta_mask`, at the same offset, counted on each one's barrier.
__device__ __forceinline__ void tma_load_2d_multicast(void* target, const CUtensorMap& map, Barrier& barrier, int x,
                                                      int y, uint16_t cta_mask, L2Hint hint = L2Hint::kNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "h"(cta_mask), "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// The same of a 5-dimensional box, into one CTA or into those named in `cta_mask`.
__device__ __forceinline__ void tma_load_5d(void* target, const CUtensorMap& map, Barrier& barrier, int x,
                                            int outermost) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(0), "r"(outermost)
      : "memory");
}

__device__ __forceinline__ void tma_load_5d_multicast(void* target, const CUtensorMap& map, Barrier& barrier, int x,
                                                      int outermost, uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %4, %4, %5}], [%2], %6;" ::"r"(smem_address(target)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(0), "r"(outermost), "h"(cta_mask)
      : "memory");
}

// cp.async.bulk.tensor, shared -> global
__device__ __forceinline__ void tma_store_3d(const CUtensorMap& map, uint32_t source, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(source), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// cp.reduce.async.bulk.tensor .add, shared -> global
__device__ __forceinline__ void tma_add_3d(const CUtensorMap& map, uint32_t source, int x, int y, int z) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(source), "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until all groups have been written.
__device__ __forceinline__ void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// fence.proxy.async: ordinary shared-memory writes become visible to wgmma and the copy engine
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace dsv3rt
