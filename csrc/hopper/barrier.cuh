// mbarriers, named barriers and clusters.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
#pragma once

#include <cstdint>

namespace dsv3rt {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One lane's arrival speaks for its warp, which has met before. compute-sanitizer's racecheck does not see what meeting
// orders, so a build for it alone (DSV3RT_FOR_RACECHECK) lets all lanes arrive.
#ifdef DSV3RT_FOR_RACECHECK
constexpr bool kAllLanesArrive = true;
#else
constexpr bool kAllLanesArrive = false;
#endif
constexpr uint32_t kArrivalsOfAWarp = kAllLanesArrive ? 32 : 1;

// A barrier by its shared address. An address held in a register is not rebuilt in every step of an inner loop.
class BarrierAddress {
 public:
  __device__ __forceinline__ explicit BarrierAddress(uint32_t address) : address_(address) {}

  // mbarrier.try_wait.parity, until it succeeds: takes the parity of the phase awaited
  __device__ __forceinline__ void wait(uint32_t parity) const {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n}" ::"r"(address_),
        "r"(parity)
        : "memory");
  }

  // mbarrier.arrive
  __device__ __forceinline__ void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_) : "memory");
  }

  // kArrivalsOfAWarp arrivals of a warp
  __device__ __forceinline__ void arrive_for_warp() const {
    if (kAllLanesArrive || threadIdx.x % 32 == 0) arrive();
  }

  // mbarrier.arrive + mbarrier.pending_count: whether this arrival was the last of its phase
  __device__ __forceinline__ bool arrive_as_last() const {
    uint32_t pending;
    asm volatile(
        "{\n.reg .b64 before;\n"
        "mbarrier.arrive.shared::cta.b64 before, [%1];\n"
        "mbarrier.pending_count.b64 %0, before;\n}"
        : "=r"(pending)
        : "r"(address_)
        : "memory");
    return pending == 1;
  }

  // mapa + mbarrier.arrive on the same barrier of another CTA of the cluster
  __device__ __forceinline__ void arrive_at(uint32_t cta_rank) const {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(address_),
        "r"(cta_rank)
        : "memory");
  }

 private:
  uint32_t address_;
};

// One phase completes when `count` arrivals and all expected bytes are in.
class Barrier {
 public:
  // mbarrier.init
  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(this)), "r"(count) : "memory");
  }

  // mbarrier.arrive.expect_tx
  __device__ __forceinline__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(this)), "r"(bytes)
                 : "memory");
  }

  __device__ __forceinline__ BarrierAddress address() const { return BarrierAddress(smem_address(this)); }
  __device__ __forceinline__ void arrive() { address().arrive(); }
  __device__ __forceinline__ void arrive_for_warp() { address().arrive_for_warp(); }
  __device__ __forceinline__ bool arrive_as_last() { return address().arrive_as_last(); }
  __device__ __forceinline__ void wait(uint32_t parity) { address().wait(parity); }

 private:
  uint64_t state_;
};

// fence.mbarrier_init: makes initialised barriers visible to the cluster and to the copy engine
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

constexpr int kNamedBarriers = 16;  // 0 is __syncthreads

// bar.sync on one of the named barriers
__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Where a group of a block's threads meets again and again: the named barrier `number`, which nothing else uses.
// racecheck loses track where groups meet unequally often, so a build for it has mbarriers.
class GroupBarrier {
 public:
  __device__ __forceinline__ GroupBarrier(int number, int num_threads) : number_(number), num_threads_(num_threads) {}

#ifdef DSV3RT_FOR_RACECHECK
  // All threads of the block call it, once for each of its families of barriers.
  __device__ __forceinline__ static void init(int first, int count, int num_threads) {
    if (threadIdx.x == 0) {
      for (int number = first; number < first + count; ++number) mbarrier(number).init(num_threads);
    }
    __syncthreads();
  }

  // mbarrier.arrive + mbarrier.try_wait of the phase that the arrival was in
  __device__ __forceinline__ void sync() const {
    asm volatile(
        "{\n.reg .pred done;\n.reg .b64 phase;\n"
        "mbarrier.arrive.shared::cta.b64 phase, [%0];\n"
        "MEET_%=:\n"
        "mbarrier.try_wait.shared::cta.b64 done, [%0], phase;\n"
        "@done bra MET_%=;\n"
        "bra MEET_%=;\n"
        "MET_%=:\n}" ::"r"(smem_address(&mbarrier(number_)))
        : "memory");
  }
#else
  __device__ __forceinline__ static void init(int, int, int) {}
  __device__ __forceinline__ void sync() const { named_barrier_sync(number_, num_threads_); }
#endif

 private:
#ifdef DSV3RT_FOR_RACECHECK
  __device__ __forceinline__ static Barrier& mbarrier(int number) {
    __shared__ Barrier barriers[kNamedBarriers];
    return barriers[number];
  }
#endif

  int number_, num_threads_;
};

// bar.arrive: does not wait
__device__ __forceinline__ void named_barrier_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// barrier.cluster.arrive + wait
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t cluster_cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// setmaxnreg: every warp of a warpgroup must execute it
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Either, from what the kernel was launched with.
template <int kLaunched, int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kRegisters < kLaunched) {
    release_registers<kRegisters>();
  } else {
    claim_registers<kRegisters>();
  }
}

// griddepcontrol: programmatic dependent launch. A kernel that may start early (launch_early) waits in each block that
// needs what the one before it writes, and in one at least, so that it does not end first.
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_prior_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace dsv3rt
