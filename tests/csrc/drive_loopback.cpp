// drive_loopback rounds: the test network of tests/gpu/gin_loopback.cc between three processes, by the functions that
// NCCL would call, in memory of the host. Prints how often a message had overtaken another; exits with 1 where a strong
// signal had overtaken a put of its context, or anything is lost.
#include <sys/wait.h>

#include "gpu/gin_loopback.cc"

namespace {

constexpr int kRanks = 3, kContexts = 4, kPuts = 12;
constexpr size_t kMostBytes = 3 << 20, kPutBytes[] = {16, 1000, kMostBytes};  // the last in several pieces

// Entries of the plugin's table by their place, as NCCL finds them.
template <typename Function>
Function at(int place) {
  return reinterpret_cast<Function>(const_cast<void*>(ncclRmaPlugin_v14[place]));
}

using Listen = Result (*)(void*, int, void*, void**);
using Connect = Result (*)(void*, void**, int, int, void*, void**);
using Register = Result (*)(void*, void*, size_t, int, uint64_t, void**);
using Put = Result (*)(void*, int, uint64_t, void*, size_t, uint64_t, void*, uint32_t, void**);
using PutSignal = Result (*)(void*, int, uint64_t, void*, size_t, uint64_t, void*, uint32_t, uint64_t, void*, uint64_t,
                             uint32_t, bool, void**);
using Call = Result (*)(void*);

// A put's place at its target: [round % 2][sender][context][put]; its first word says round + 1.
size_t place_of(int round, int sender, int context, int put) {
  return (((size_t(round % 2) * kRanks + sender) * kContexts + context) * kPuts + put) * sizeof(uint64_t);
}

size_t bulk_of(int round, int sender) { return (size_t(round % 2) * kRanks + sender) * kMostBytes; }

struct Side {
  int rank = 0;
  void* network = nullptr;
  std::vector<uint64_t> words = std::vector<uint64_t>(2 * kRanks * kContexts * kPuts);
  std::vector<char> bulk = std::vector<char>(2 * kRanks * kMostBytes), source = std::vector<char>(kMostBytes);
  std::vector<uint64_t> signals = std::vector<uint64_t>(kRanks * kContexts);
  uint64_t value = 0;
  void *words_region = nullptr, *bulk_region = nullptr, *source_region = nullptr, *signals_region = nullptr;
  void* value_region = nullptr;
  int overtaken = 0;

  template <typename Vector>
  void* add(Vector& memory) {
    void* region = nullptr;
    at<Register>(7)(network, memory.data(), memory.size() * sizeof(memory[0]), kCudaMemory, 0, &region);
    return region;
  }

  void send(int round) {
    void* request = nullptr;
    value = uint64_t(round) + 1;
    for (int context = 0; context < kContexts; ++context) {
      for (int peer = 0; peer < kRanks; ++peer) {
        for (int put = 0; put < kPuts; ++put) {
          at<Put>(13)(network, context, 0, value_region, 8, place_of(round, rank, context, put), words_region,
                      uint32_t(peer), &request);
        }
        if (context == 0) {
          const size_t bytes = kPutBytes[round % 3];
          std::fill(source.begin(), source.begin() + long(bytes), char(round));
          at<Put>(13)(network, context, 0, source_region, bytes, bulk_of(round, rank), bulk_region, uint32_t(peer),
                      &request);
        }
        at<PutSignal>(14)(network, context, 0, nullptr, 0, 0, nullptr, uint32_t(peer),
                          (rank * kContexts + context) * 8ul, signals_region, 0, kIncrement, true, &request);
      }
    }
  }

  // Whether all that was sent ahead of the signals is here.
  bool receive(int round) {
    for (int sender = 0; sender < kRanks; ++sender) {
      for (int context = kContexts - 1; context >= 0; --context) {
        while (signals[sender * kContexts + context] < uint64_t(round) + 1) {
          if (at<Call>(18)(network) != kSuccess) return false;
          count_overtaken(round, sender);
        }
        for (int put = 0; put < kPuts; ++put) {
          if (words[place_of(round, sender, context, put) / 8] != uint64_t(round) + 1) return false;
        }
      }
      const size_t bytes = kPutBytes[round % 3];
      for (size_t i = 0; i < bytes; ++i) {
        if (bulk[bulk_of(round, sender) + i] != char(round)) return false;
      }
    }
    return true;
  }

  void count_overtaken(int round, int sender) {
    for (int context = 0; context < kContexts; ++context) {
      const uint64_t* first = &words[place_of(round, sender, context, 0) / 8];
      overtaken += first[0] != uint64_t(round) + 1 && first[kPuts - 1] == uint64_t(round) + 1;
    }
  }
};

// One rank; `ends` carry everybody's handles to everybody.
int run(int rank, int rounds, int (*ends)[2]) {
  char handle[kHandleBytes] = {};
  void* listener = nullptr;
  if (at<Listen>(4)(nullptr, 0, handle, &listener) != kSuccess) return 1;
  for (int r = 0; r < kRanks; ++r) {
    if (write(ends[r * kRanks + rank][1], handle, sizeof(handle)) < 0) return 1;
  }
  std::vector<std::vector<char>> handles(kRanks, std::vector<char>(kHandleBytes));
  std::vector<void*> pointers;
  for (int r = 0; r < kRanks; ++r) {
    if (read(ends[rank * kRanks + r][0], handles[r].data(), kHandleBytes) != long(kHandleBytes)) return 1;
    pointers.push_back(handles[r].data());
  }
  Side side;
  side.rank = rank;
  if (at<Connect>(5)(nullptr, pointers.data(), kRanks, rank, listener, &side.network) != kSuccess) return 1;
  at<Call>(12)(listener);
  side.words_region = side.add(side.words);
  side.bulk_region = side.add(side.bulk);
  side.source_region = side.add(side.source);
  side.signals_region = side.add(side.signals);
  at<Register>(7)(side.network, &side.value, 8, kHostMemory, 0, &side.value_region);
  for (int round = 0; round < rounds; ++round) {
    side.send(round);
    if (!side.receive(round)) return 1;  // of everybody, so nobody is ahead by more than one
  }
  printf("%d\n", side.overtaken);
  fflush(stdout);
  at<Call>(11)(side.network);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  int ends[kRanks * kRanks][2];
  for (auto& end : ends) {
    if (pipe(end) != 0) return 1;
  }
  for (int rank = 0; rank < kRanks; ++rank) {
    if (fork() == 0) alarm(60), _exit(run(rank, atoi(argv[1]), ends));
  }
  int code = 0;
  for (int status, rank = 0; rank < kRanks; ++rank) {
    wait(&status);
    code = code != 0 || status != 0;
  }
  return code;
}
