// As much of CUDA's language as the exchange's kernels use, on the host: a block is a thread of the operating system,
// its threads are fibers that take turns where one waits for another.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ inline
#define __device__
#define __shared__ thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace host {

struct Index {
  unsigned x;
};

constexpr unsigned kFullWarp = 0xffffffffu;

// A block's fibers, and what they wait for.
class Block {
 public:
  Block(int num_threads, std::function<void()> body) : body_(std::move(body)), fibers_(num_threads) {
    for (int i = 0; i < num_threads; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &main_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    warps_.resize((num_threads + 31) / 32);
  }

  void run();

  int current() const { return current_; }
  int size() const { return int(fibers_.size()); }

  void yield() { swapcontext(&fibers_[current_].context, &main_); }

  // Values of the warp's lanes; all of them come here.
  const uint64_t* exchange(uint64_t value) {
    Meeting& warp = warps_[current_ / 32];
    meet(warp, std::min(32, size() - current_ / 32 * 32), [&] { warp.values[current_ % 32] = value; });
    return warp.seen;
  }

  // Sums of what the block's threads bring.
  uint64_t sum(uint64_t value) {
    meet(block_, size(), [&] { block_.values[0] = (block_.arrived == 0 ? 0 : block_.values[0]) + value; });
    return block_.seen[0];
  }

 private:
  static constexpr size_t kStackBytes = 128 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  struct Meeting {
    int arrived = 0;
    uint64_t generation = 0;
    uint64_t values[32], seen[32];
  };

  template <typename Bring>
  void meet(Meeting& meeting, int expected, Bring bring) {
    bring();
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == expected) {
      std::copy(meeting.values, meeting.values + 32, meeting.seen);
      meeting.arrived = 0;
      ++meeting.generation;
    }
    while (meeting.generation == generation) yield();
  }

  static void enter();

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  Meeting block_;
  ucontext_t main_;
  int current_ = 0;
};

inline thread_local Block* block = nullptr;
inline thread_local Index block_index{}, grid_size{};

inline void Block::enter() {
  block->body_();
  block->fibers_[block->current_].done = true;
}

inline void Block::run() {
  block = this;
  for (bool left = true; left;) {
    left = false;
    for (current_ = 0; current_ < size(); ++current_) {
      if (fibers_[current_].done) continue;
      swapcontext(&main_, &fibers_[current_].context);
      left = left || !fibers_[current_].done;
    }
    std::this_thread::yield();
  }
}

inline Index thread_index() { return {unsigned(block->current())}; }
inline Index block_size() { return {unsigned(block->size())}; }

// Where a thread looks for what another does.
inline void step() { block->yield(); }

// Kernels start late by up to this, one of eight by up to four times as much: ranks fall behind one another.
inline std::atomic<int> skew_us = 0;

// Runs a kernel to its end.
template <typename Kernel>
void launch(int num_blocks, int num_threads, Kernel kernel) {
  thread_local std::minstd_rand random(std::hash<std::thread::id>()(std::this_thread::get_id()));
  const unsigned most_us = unsigned(skew_us) * (random() % 8 == 0 ? 4 : 1);
  if (most_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % most_us));
  std::vector<std::thread> blocks;
  for (int i = 0; i < num_blocks; ++i) {
    blocks.emplace_back([=] {
      block_index = {unsigned(i)};
      grid_size = {unsigned(num_blocks)};
      Block(num_threads, kernel).run();
    });
  }
  for (std::thread& thread : blocks) thread.join();
}

}  // namespace host

#define threadIdx (::host::thread_index())
#define blockDim (::host::block_size())
#define blockIdx (::host::block_index)
#define gridDim (::host::grid_size)

using std::max;
using std::min;

inline void __syncwarp() { host::block->exchange(0); }
inline void __syncthreads() { host::block->sum(0); }
inline int __syncthreads_and(int value) { return host::block->sum(value != 0) == uint64_t(host::block->size()); }
inline int __syncthreads_or(int value) { return host::block->sum(value != 0) != 0; }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename Test>
unsigned lanes_where(uint64_t value, Test test) {
  const uint64_t* values = host::block->exchange(value);
  unsigned lanes = 0;
  const int count = std::min(32, host::block->size() - host::block->current() / 32 * 32);
  for (int i = 0; i < count; ++i) lanes |= unsigned(test(values[i])) << i;
  return lanes;
}

inline unsigned __ballot_sync(unsigned, int value) {
  return lanes_where(value != 0, [](uint64_t one) { return one != 0; });
}
inline int __all_sync(unsigned, int value) { return __ballot_sync(host::kFullWarp, value == 0) == 0; }
inline unsigned __match_any_sync(unsigned, int value) {
  return lanes_where(uint32_t(value), [=](uint64_t one) { return one == uint32_t(value); });
}
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t other = uint32_t(host::block->exchange(bits)[(host::block->current() % 32) ^ distance]);
  std::memcpy(&value, &other, 4);
  return value;
}
inline int __shfl_xor_sync(unsigned, int value, int distance) {
  return int(uint32_t(host::block->exchange(uint32_t(value))[(host::block->current() % 32) ^ distance]));
}
inline int __shfl_up_sync(unsigned, int value, int distance) {
  const uint64_t* values = host::block->exchange(uint32_t(value));
  const int lane = host::block->current() % 32;
  return int(uint32_t(values[lane < distance ? lane : lane - distance]));
}
inline uint64_t __shfl_sync(unsigned, uint64_t value, int lane) { return host::block->exchange(value)[lane]; }
inline int __shfl_sync(unsigned, int value, int lane) {
  return int(uint32_t(host::block->exchange(uint32_t(value))[lane]));
}
inline float __shfl_sync(unsigned, float value, int lane) {
  return std::bit_cast<float>(uint32_t(host::block->exchange(std::bit_cast<uint32_t>(value))[lane]));
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned atomicAdd(unsigned* target, unsigned value) {
  return std::atomic_ref<unsigned>(*target).fetch_add(value);
}
inline unsigned atomicExch(unsigned* target, unsigned value) {
  return std::atomic_ref<unsigned>(*target).exchange(value);
}
template <typename Value>
Value __ldcg(const Value* pointer) {
  return *pointer;
}
template <typename Value>
Value __ldg(const Value* pointer) {
  return *pointer;
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
