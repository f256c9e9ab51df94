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
constexpr int kQueue = 256;  // of NCCL's proxy, for a peer and a context

// A rail: windows of its ranks, one a node, and what is under way between them.
struct Rail {
  struct Message {
    int from, to, context, signal;  // signal -1: a put
    std::vector<char> bytes;
    int64_t source, target;
    std::chrono::steady_clock::time_point due;
  };
  std::vector<char*> windows;
  std::vector<std::vector<uint64_t>> signals;  // [node][context * kSignals + signal]
  std::mutex mutex;
  std::vector<Message> queued, under_way;  // not taken from their sender yet, and then
  std::minstd_rand random;
  int delay_us = 0;
  int64_t window_bytes = 0, num_puts = 0, put_bytes = 0;

  // A full queue would do no harm by itself; the kernels' promise is that it never is.
  void post(Message message) {
    const std::lock_guard<std::mutex> lock(mutex);
    int ahead = 0;
    for (const Message& one : queued) {
      ahead += one.from == message.from && one.to == message.to && one.context == message.context;
    }
    if (ahead >= kQueue) {
      std::printf("node %d has more than %d puts for node %d in context %d\n", message.from, kQueue, message.to,
                  message.context);
      std::exit(1);
    }
    queued.push_back(std::move(message));
  }

  bool has_queued(int from, int context) {
    const std::lock_guard<std::mutex> lock(mutex);
    return std::any_of(queued.begin(), queued.end(),
                       [&](const Message& one) { return one.from == from && one.context == context; });
  }

  void deliver() {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto now = std::chrono::steady_clock::now();
    const size_t taken = std::min<size_t>(queued.size(), random() % 16);
    for (size_t i = 0; i < taken; ++i) {
      const char* source = windows[queued[i].from] + queued[i].source;  // read when it is taken, not before
      std::copy(source, source + queued[i].bytes.size(), queued[i].bytes.begin());
      queued[i].due = now + std::chrono::microseconds(delay_us ? random() % delay_us : 0);
      under_way.push_back(std::move(queued[i]));
    }
    queued.erase(queued.begin(), queued.begin() + long(taken));
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
    rail.post({comm.node, peer, context, -1, std::vector<char>(bytes), int64_t(source), int64_t(target), {}});
    std::atomic_ref<int64_t>(rail.num_puts).fetch_add(1);
    std::atomic_ref<int64_t>(rail.put_bytes).fetch_add(int64_t(bytes));
  }

  void signal(ncclTeam, int peer, ncclGin_StrongSignalInc told, ncclCoopThread, ncclGin_DescriptorSmem) const {
    comm.rail->post({comm.node, peer, context, int(told.signal), {}, 0, 0, {}});
  }

  ncclResult_t flush(ncclCoopWarp, cuda::memory_order, ncclGin_None, uint64_t) const {
    __syncwarp();
    while (comm.rail->has_queued(comm.node, context)) host::step();
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
