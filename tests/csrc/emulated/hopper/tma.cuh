// What csrc/hopper/tma.cuh is on a GPU, for threads of the host: bulk copies that happen as late as they may.
#pragma once

#include <map>

#include "hopper/barrier.cuh"

namespace dsv3rt {

enum class L2Hint { kNormal, kEvictFirst, kEvictLast };

struct BulkStore {
  char* target;
  const char* source;
  uint32_t bytes;
  std::vector<char> read;
};

inline thread_local std::map<int, std::vector<BulkStore>> bulk_stores;  // of each thread of the block

inline void bulk_load(void* target, const void* source, uint32_t bytes, Barrier& barrier, L2Hint) {
  barrier.bring(target, source, bytes);
}

inline void bulk_store(void* target, const void* source, uint32_t bytes) {
  bulk_stores[host::block->current()].push_back(
      {static_cast<char*>(target), static_cast<const char*>(source), bytes, {}});
}

inline void tma_store_commit() {}

// What is in shared memory has been read, but not written where it goes.
template <int kPending>
void tma_store_wait_read() {
  host::step();
  for (BulkStore& store : bulk_stores[host::block->current()]) {
    if (store.read.empty()) store.read.assign(store.source, store.source + store.bytes);
  }
}

inline void tma_store_wait_all() {
  tma_store_wait_read<0>();
  std::vector<BulkStore>& stores = bulk_stores[host::block->current()];
  for (const BulkStore& store : stores) std::copy(store.read.begin(), store.read.end(), store.target);
  stores.clear();
}

}  // namespace dsv3rt
