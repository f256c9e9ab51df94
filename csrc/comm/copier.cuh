// Lanes that move pieces of rows by the bulk copy engine, each through a stage of its own in shared memory. Bytes that
// are under way so take no registers, and the warp's other work is to find addresses.
#pragma once

#include <cstdint>

#include "comm/window.h"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"

namespace dsv3rt {

constexpr int kCopyWarps = 4;  // the first of a block
constexpr int kCopyLanes = 7;  // of each of them
constexpr int kCopiers = kCopyWarps * kCopyLanes;

struct CopierStorage {
  alignas(128) char stages[kCopiers][kMaxPieceBytes];
  Barrier loaded[kCopiers];
};

struct Piece {
  char* target;
  const char* source;
  int bytes;  // 0: nothing to copy
};

// By one thread, before __syncthreads.
__device__ inline void start_copiers(CopierStorage& storage) {
  for (int i = 0; i < kCopiers; ++i) storage.loaded[i].init(1);
  fence_barrier_init();
}

// One lane's part of a copy; the warp goes through the steps together.
class Copier {
 public:
  __device__ Copier(CopierStorage& storage, int copier)
      : stage_(storage.stages[copier]), loaded_(storage.loaded[copier]) {}

  __device__ __forceinline__ void load(const Piece& piece) {
    if (piece.bytes == 0) return;
    loaded_.arrive_and_expect(piece.bytes);
    bulk_load(stage_, piece.source, piece.bytes, loaded_, L2Hint::kEvictFirst);
  }

  __device__ __forceinline__ void store(const Piece& piece) {
    if (piece.bytes == 0) return;
    loaded_.wait(parity_);
    parity_ ^= 1;
    bulk_store(piece.target, stage_, piece.bytes);
    tma_store_commit();
  }

  // Until the stage may be loaded again.
  __device__ __forceinline__ void release() { tma_store_wait_read<0>(); }

  // Until what was stored is written.
  __device__ __forceinline__ void finish() { tma_store_wait_all(); }

 private:
  char* stage_;
  Barrier& loaded_;
  uint32_t parity_ = 0;
};

}  // namespace dsv3rt
