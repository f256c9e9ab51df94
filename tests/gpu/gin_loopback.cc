// A network for tests: NCCL's one-sided puts between processes of one machine, through sockets of that machine. With it
// NCCL's device API comes up between "nodes" that are parts of one machine, or of one GPU. It says nothing of speed.
//
// Built and set up by run_ranks.py (--nodes). It is an RMA plugin of version 14, which NCCL 2.30.7 and newer load by
// NCCL_RMA_PLUGIN; what follows under "interface" are the facts of that binary interface.
//
//   GIN_LOOPBACK_DELAY_US   each message waits up to that long at its receiver, so messages overtake one another: what
//   NCCL
//                           allows but for a strong signal, which no earlier message of its context may follow
//   GIN_LOOPBACK_SEED       of the delays
//
// Messages to a process that has ended vanish. gin.get is refused. Copies are calls of CUDA in the ranks' processes: a
// rank must not meanwhile make others that wait for its running kernels. A copy that took long says so.
#include <cuda_runtime.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace {

// ---- interface ----

using Result = int;
constexpr Result kSuccess = 0, kCudaError = 1, kSystemError = 2, kInvalidUsage = 5;
constexpr int kHostMemory = 1, kCudaMemory = 2, kProxyDevice = 2, kProxyVersion = 100;
constexpr uint32_t kIncrement = 1;
constexpr size_t kHandleBytes = 128;

struct Properties {
  char* name;
  char* pci_path;
  uint64_t guid;
  int memory_kinds, registers_globally, must_flush, megabits, port;
  float latency;
  int max_comms, max_receives, device_type, device_version;
  struct {
    int count, devices[8];
  } parts;
  size_t max_bytes, max_collective_bytes;
  int max_requests;
  int16_t rail, plane;
};

// ---- messages ----

struct Message {
  int32_t target_region, signal_region;  // -1: none
  uint64_t target_offset, num_bytes;  // the payload follows
  uint64_t signal_offset, signal_value;
  int32_t context, is_strong;
};

struct Arrived {
  Message message;
  std::string payload;
  std::chrono::steady_clock::time_point due;
};

struct Peer {
  int socket = -1;
  std::string out, in;  // bytes not sent yet, and of a message that has not come whole
  std::vector<Arrived> waiting;
};

struct Region {
  char* base;
  size_t num_bytes;
  int index;
};

int setting(const char* name) {
  const char* text = getenv(name);
  return text != nullptr ? atoi(text) : 0;
}

bool failed(const char* what) {
  fprintf(stderr, "gin_loopback: %s\n", what);
  return false;
}

class Network {
 public:
  Network(int num_ranks, int rank) : peers_(num_ranks), rank_(rank) {
    delay_us_ = setting("GIN_LOOPBACK_DELAY_US");
    random_.seed(unsigned(setting("GIN_LOOPBACK_SEED") * 1000 + rank));
  }

  // The object stays, for those that still ask for it.
  void close_sockets() {
    for (Peer& peer : peers_) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
      while (!peer.out.empty() && std::chrono::steady_clock::now() < end) send(peer);
      if (peer.socket >= 0) close(peer.socket);
      peer.socket = -1;
    }
  }

  bool open(void* handles[], int listener) {
    int least = 0, greatest = 0;  // a priority of its own, so that no kernel that waits for a copy is queued before it
    if (cudaGetDevice(&device_) != cudaSuccess || cudaMallocHost(&bounce_, kBounceBytes) != cudaSuccess ||
        cudaDeviceGetStreamPriorityRange(&least, &greatest) != cudaSuccess ||
        cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest) != cudaSuccess) {
      return failed("no CUDA device");
    }
    for (int r = rank_ + 1; r < int(peers_.size()); ++r) {
      peers_[r].socket = dial(static_cast<const char*>(handles[r]));
      if (peers_[r].socket < 0 || write(peers_[r].socket, &rank_, sizeof(rank_)) != sizeof(rank_)) {
        return failed("a peer cannot be reached");
      }
    }
    for (int r = 0; r < rank_; ++r) {
      const int socket = accept(listener, nullptr, nullptr);
      int caller = -1;
      if (socket < 0 || read(socket, &caller, sizeof(caller)) != sizeof(caller)) return failed("a peer did not come");
      peers_[caller].socket = socket;
    }
    for (Peer& peer : peers_) {
      if (peer.socket >= 0) fcntl(peer.socket, F_SETFL, O_NONBLOCK);
    }
    return true;
  }

  static int dial(const char* name) {
    const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    const socklen_t size = address_of(name, &address);
    if (connect(socket, reinterpret_cast<sockaddr*>(&address), size) == 0) return socket;
    close(socket);
    return -1;
  }

  // A name without a file: it goes with its process.
  static socklen_t address_of(const char* name, sockaddr_un* address) {
    const size_t length = std::min(strlen(name), sizeof(address->sun_path) - 1);
    address->sun_family = AF_UNIX;
    memcpy(address->sun_path + 1, name, length);
    return socklen_t(offsetof(sockaddr_un, sun_path) + 1 + length);
  }

  Region* add_region(char* base, size_t num_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    regions_.push_back(new Region{base, num_bytes, int(regions_.size())});
    return regions_.back();
  }

  void drop_region(Region* region) {
    const std::lock_guard<std::mutex> lock(mutex_);
    region->base = nullptr;  // the number stays: all ranks count alike
  }

  bool put(int peer, Message message, const Region* source, uint64_t offset) {
    const std::lock_guard<std::mutex> lock(mutex_);
    enter();
    std::string payload(message.num_bytes, '\0');
    for (size_t done = 0; done < payload.size(); done += kBounceBytes) {
      const size_t part = std::min(kBounceBytes, payload.size() - done);
      if (!copy(bounce_, source->base + offset + done, part)) return false;
      memcpy(payload.data() + done, bounce_, part);
    }
    if (peer == rank_) {
      arrive(peers_[peer], message, std::move(payload));
    } else {
      peers_[peer].out.append(reinterpret_cast<const char*>(&message), sizeof(message)).append(payload);
      send(peers_[peer]);
    }
    return true;
  }

  bool progress() {
    const std::lock_guard<std::mutex> lock(mutex_);
    enter();
    for (Peer& peer : peers_) {
      if (!peer.out.empty()) send(peer);
      if (peer.socket >= 0) receive(peer);
      if (!peer.waiting.empty() && !deliver(peer)) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBounceBytes = 1 << 20;

  // NCCL's thread may copy while another one captures a graph.
  void enter() {
    thread_local bool is_ready = false;
    if (is_ready) return;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaSetDevice(device_);
    is_ready = true;
  }

  bool copy(void* target, const void* source, size_t num_bytes) {
    const auto start = std::chrono::steady_clock::now();
    if (cudaMemcpyAsync(target, source, num_bytes, cudaMemcpyDefault, stream_) != cudaSuccess ||
        cudaStreamSynchronize(stream_) != cudaSuccess) {
      return failed(cudaGetErrorString(cudaGetLastError()));
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds > 0.5) fprintf(stderr, "gin_loopback: a copy was held up for %.2f s\n", seconds);
    return true;
  }

  void send(Peer& peer) {
    if (peer.socket < 0) return peer.out.clear();
    const ssize_t sent = ::send(peer.socket, peer.out.data(), peer.out.size(), MSG_NOSIGNAL);
    if (sent > 0) {
      peer.out.erase(0, size_t(sent));
    } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
      peer.out.clear();  // it has ended
    }
  }

  void receive(Peer& peer) {
    char buffer[1 << 16];
    size_t total = 0;
    for (ssize_t got; total < kBounceBytes && (got = read(peer.socket, buffer, sizeof(buffer))) > 0;) {
      peer.in.append(buffer, size_t(got));
      total += size_t(got);
    }
    size_t start = 0;
    for (Message message; total > 0 && peer.in.size() - start >= sizeof(message);) {
      memcpy(&message, peer.in.data() + start, sizeof(message));
      if (peer.in.size() - start < sizeof(message) + message.num_bytes) break;
      arrive(peer, message, peer.in.substr(start + sizeof(message), message.num_bytes));
      start += sizeof(message) + message.num_bytes;
    }
    peer.in.erase(0, start);
  }

  void arrive(Peer& peer, const Message& message, std::string payload) {
    auto due = std::chrono::steady_clock::now();
    if (delay_us_ > 0) due += std::chrono::microseconds(random_() % unsigned(delay_us_));
    peer.waiting.push_back({message, std::move(payload), due});
  }

  // Those that are due, in their order, but for strong signals that others of their context are still ahead of.
  bool deliver(Peer& peer) {
    const auto now = std::chrono::steady_clock::now();
    std::vector<Arrived> later;
    uint64_t held_contexts = 0;
    for (Arrived& one : peer.waiting) {
      const uint64_t context = uint64_t(1) << (one.message.context % 64);
      const bool held = one.due > now || !is_registered(one.message) ||
                        (one.message.is_strong != 0 && (held_contexts & context) != 0);
      if (!held) {
        if (!apply(one)) return false;
        continue;
      }
      held_contexts |= context;
      later.push_back(std::move(one));
    }
    peer.waiting = std::move(later);
    return true;
  }

  bool is_registered(const Message& message) const {
    return std::max(message.target_region, message.signal_region) < int(regions_.size());
  }

  bool apply(const Arrived& one) {
    const Message& message = one.message;
    const std::string& payload = one.payload;
    char* target = message.target_region >= 0 ? regions_[message.target_region]->base : nullptr;
    for (size_t done = 0; target != nullptr && done < payload.size(); done += kBounceBytes) {
      const size_t part = std::min(kBounceBytes, payload.size() - done);
      memcpy(bounce_, payload.data() + done, part);
      if (!copy(target + message.target_offset + done, bounce_, part)) return false;
    }
    char* signals = message.signal_region >= 0 ? regions_[message.signal_region]->base : nullptr;
    if (signals == nullptr) return true;
    auto* value = static_cast<uint64_t*>(bounce_);
    if (!copy(value, signals + message.signal_offset, sizeof(*value))) return false;
    *value += message.signal_value;
    return copy(signals + message.signal_offset, value, sizeof(*value));
  }

  std::vector<Peer> peers_;
  int rank_, device_ = 0, delay_us_ = 0;
  std::minstd_rand random_;
  std::mutex mutex_;
  std::vector<Region*> regions_;
  cudaStream_t stream_ = nullptr;
  void* bounce_ = nullptr;
};

// ---- the plugin's functions, in NCCL's order ----

Result init(void** context, uint64_t, void (*)(int, unsigned long, const char*, int, const char*, ...)) {
  static int any;
  *context = &any;
  return kSuccess;
}

Result devices(int* count) {
  *count = 1;
  return kSuccess;
}

Result get_properties(int, Properties* properties) {
  static char name[] = "loopback";
  *properties = Properties{};
  properties->name = name;
  properties->guid = 1;
  properties->memory_kinds = kHostMemory | kCudaMemory;
  properties->megabits = 400000;
  properties->port = 1;
  properties->latency = 1;
  properties->max_comms = 1 << 16;
  properties->max_receives = 8;
  properties->device_type = kProxyDevice;
  properties->device_version = kProxyVersion;
  properties->parts.count = 1;
  properties->max_bytes = properties->max_collective_bytes = size_t(1) << 40;
  properties->max_requests = 1;
  properties->rail = properties->plane = -1;
  return kSuccess;
}

Result listen_for_peers(void*, int, void* handle, void** listener) {
  static int count = 0;
  char name[kHandleBytes] = {};
  snprintf(name, sizeof(name), "dsv3rt-gin-%d-%d", int(getpid()), count++);
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  const socklen_t size = Network::address_of(name, &address);
  if (bind(socket, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(socket, 128) != 0) {
    failed("no socket to listen at");
    return kSystemError;
  }
  memcpy(handle, name, sizeof(name));
  *listener = new int(socket);
  return kSuccess;
}

Result connect_all(void*, void* handles[], int num_ranks, int rank, void* listener, void** network) {
  auto* made = new Network(num_ranks, rank);
  if (!made->open(handles, *static_cast<int*>(listener))) return kSystemError;
  *network = made;
  return kSuccess;
}

Result create_context(void* network, void*, void** context) {
  *context = network;
  return kSuccess;
}

Result register_memory(void* network, void* data, size_t num_bytes, int, uint64_t, void** region) {
  *region = static_cast<Network*>(network)->add_region(static_cast<char*>(data), num_bytes);
  return kSuccess;
}

Result register_dma_buffer(void*, void*, size_t, int, uint64_t, int, uint64_t, void**) { return kInvalidUsage; }

Result deregister_memory(void* network, void* region) {
  static_cast<Network*>(network)->drop_region(static_cast<Region*>(region));
  return kSuccess;
}

Result destroy_context(void*) { return kSuccess; }

Result close_network(void* network) {
  static_cast<Network*>(network)->close_sockets();
  return kSuccess;
}

Result close_listener(void* listener) {
  close(*static_cast<int*>(listener));
  delete static_cast<int*>(listener);
  return kSuccess;
}

int index_of(void* region) { return region != nullptr ? static_cast<Region*>(region)->index : -1; }

Result put_signal(void* network, int context, uint64_t source_offset, void* source, size_t num_bytes,
                  uint64_t target_offset, void* target, uint32_t peer, uint64_t signal_offset, void* signal,
                  uint64_t value, uint32_t operation, bool is_strong, void** request) {
  static int taken;
  *request = &taken;
  const Message message{index_of(target), index_of(signal), target_offset,
                        num_bytes,        signal_offset,    operation == kIncrement ? 1 : value,
                        context,          is_strong};
  const bool fine =
      static_cast<Network*>(network)->put(int(peer), message, static_cast<Region*>(source), source_offset);
  return fine ? kSuccess : kCudaError;
}

Result put(void* network, int context, uint64_t source_offset, void* source, size_t num_bytes, uint64_t target_offset,
           void* target, uint32_t peer, void** request) {
  return put_signal(network, context, source_offset, source, num_bytes, target_offset, target, peer, 0, nullptr, 0, 0,
                    false, request);
}

Result get(void*, int, uint64_t, void*, size_t, uint64_t, void*, uint32_t, void**) { return kInvalidUsage; }

Result flush(void*, int, void*, uint32_t, void** request) {
  static int taken;
  *request = &taken;
  return kSuccess;
}

Result test(void*, void*, int* done) {
  *done = 1;
  return kSuccess;
}

Result progress(void* network) { return static_cast<Network*>(network)->progress() ? kSuccess : kCudaError; }

Result query_last_error(void*, bool* has_error) {
  *has_error = false;
  return kSuccess;
}

Result finalize(void*) { return kSuccess; }

template <typename Function>
const void* entry(Function* function) {
  return reinterpret_cast<const void*>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const void* const ncclRmaPlugin_v14[] = {"loopback",
                                                                                           entry(init),
                                                                                           entry(devices),
                                                                                           entry(get_properties),
                                                                                           entry(listen_for_peers),
                                                                                           entry(connect_all),
                                                                                           entry(create_context),
                                                                                           entry(register_memory),
                                                                                           entry(register_dma_buffer),
                                                                                           entry(deregister_memory),
                                                                                           entry(destroy_context),
                                                                                           entry(close_network),
                                                                                           entry(close_listener),
                                                                                           entry(put),
                                                                                           entry(put_signal),
                                                                                           entry(get),
                                                                                           entry(flush),
                                                                                           entry(test),
                                                                                           entry(progress),
                                                                                           entry(query_last_error),
                                                                                           entry(finalize)};
