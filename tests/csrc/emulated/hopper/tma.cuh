// What csrc/hopper/tma.cuh is on a GPU, for threads of the host: bulk copies that happen as late as they may.
#pragma once

#include <map>

#include "hopper/barrier.cuh"

namespace dsv3rt {

enum class L2Hint { kNormal, kEvictFirst, kEvictLast };

struct BulkStore {
  void* target;
  const void* source;
  uint32_t bytes;
  bool committed;
};

inline thread_local std::map<int, std::vector<BulkStore>> bulk_stores;  // of each thread of the block

inline void bulk_load(void* target, const void* source, uint32_t bytes, Barrier& barrier, L2Hint) {
  barrier.bring(target, source, bytes);
}

inline void bulk_store(void* target, const void* source, uint32_t bytes) {
  bulk_stores[host::block->current()].push_back({target, source, bytes, false});
}

inline void tma_store_commit() {
  for (BulkStore& store : bulk_stores[host::block->current()]) store.committed = true;
}

inline void tma_store_wait_all() {
  host::step();
  std::erase_if(bulk_stores[host::block->current()], [](const BulkStore& store) {
    if (store.committed) std::memcpy(store.target, store.source, store.bytes);
    return store.committed;
  });
}

}  // namespace dsv3rt
