// NCCL's one-sided puts, as the kernels between nodes use them, carried by a thread of the host that delays and
// reorders them as far as NCCL may.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>

#include "comm/rails.h"
#include "cuda_on_host.h"

#define DSV3RT_HAS_RAILS 1

using ncclGinSignal_t = uint32_t;
using ncclWindow_t = int;
enum ncclResult_t { ncclSuccess, ncclTimeout };
struct ncclGinDescriptorSmem {};
struct ncclGin_None {};
struct ncclGin_DescriptorSmem {
  ncclGinDescriptorSmem* descriptor;
};
struct ncclGin_StrongSignalInc {
  ncclGinSignal_t signal;
};
struct ncclCoopThread {};
struct ncclCoopWarp {};
namespace cuda {
enum memory_order { memory_order_acquire };
}

namespace host {

constexpr int kContexts = 4, kSignals = 512;

// A rail: windows of its ranks, one a node, and what is under way between them.
struct Rail {
  struct Message {
    int from, to, context, signal;  // signal -1: a put
    std::vector<char> bytes;
    int64_t target;
    std::chrono::steady_clock::time_point due;
  };
  std::vector<char*> windows;
  std::vector<std::vector<uint64_t>> signals;  // [node][context * kSignals + signal]
  std::mutex mutex;
  std::vector<Message> under_way;
  std::minstd_rand random;
  int delay_us = 0;
  int64_t window_bytes = 0, num_puts = 0, put_bytes = 0;

  void post(Message message) {
    const std::lock_guard<std::mutex> lock(mutex);
    message.due = std::chrono::steady_clock::now() + std::chrono::microseconds(delay_us ? random() % delay_us : 0);
    under_way.push_back(std::move(message));
  }

  void deliver() {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto now = std::chrono::steady_clock::now();
    std::vector<Message> later;
    for (Message& one : under_way) {
      bool held = one.due > now;
      for (const Message& earlier : later) {
        held = held ||
               (one.signal >= 0 && earlier.from == one.from && earlier.to == one.to && earlier.context == one.context);
      }
      if (held) {
        later.push_back(std::move(one));
      } else if (one.signal < 0) {
        std::memcpy(windows[one.to] + one.target, one.bytes.data(), one.bytes.size());
      } else {
        std::atomic_ref<uint64_t>(signals[one.to][one.context * kSignals + one.signal]).fetch_add(1);
      }
    }
    under_way = std::move(later);
  }
};

}  // namespace host

struct ncclTeam {};

struct ncclDevComm {
  host::Rail* rail;
  int node;
  uint32_t ginContextCount;
};

inline ncclTeam ncclTeamRail(const ncclDevComm&) { return {}; }

struct ncclGin {
  const ncclDevComm& comm;
  int context;

  ncclGin(const ncclDevComm& comm, int context) : comm(comm), context(context) {}

  void put(ncclTeam, int peer, ncclWindow_t, size_t target, ncclWindow_t, size_t source, size_t bytes, ncclGin_None,
           ncclGin_None, ncclCoopThread, ncclGin_DescriptorSmem) const {
    host::Rail& rail = *comm.rail;
    if (peer == comm.node || peer < 0 || peer >= int(rail.windows.size()) || bytes == 0 ||
        int64_t(target + bytes) > rail.window_bytes || int64_t(source + bytes) > rail.window_bytes) {
      std::printf("put of %zu bytes from %zu of node %d to %zu of node %d\n", bytes, source, comm.node, target, peer);
      std::exit(1);
    }
    const char* from = rail.windows[comm.node] + source;
    rail.post({comm.node, peer, context, -1, std::vector<char>(from, from + bytes), int64_t(target), {}});
    std::atomic_ref<int64_t>(rail.num_puts).fetch_add(1);
    std::atomic_ref<int64_t>(rail.put_bytes).fetch_add(int64_t(bytes));
  }

  void signal(ncclTeam, int peer, ncclGin_StrongSignalInc told, ncclCoopThread, ncclGin_DescriptorSmem) const {
    comm.rail->post({comm.node, peer, context, int(told.signal), {}, 0, {}});
  }

  ncclResult_t flush(ncclCoopWarp, cuda::memory_order, ncclGin_None, uint64_t) const {
    __syncwarp();
    return ncclSuccess;
  }

  uint64_t readSignal(ncclGinSignal_t signal) const {
    host::step();
    return std::atomic_ref<uint64_t>(comm.rail->signals[comm.node][context * host::kSignals + signal]).load();
  }
};

namespace dsv3rt {

struct Rails {
  ncclDevComm device;
  ncclWindow_t window;
};

}  // namespace dsv3rt
