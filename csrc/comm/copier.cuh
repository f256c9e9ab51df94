// Lanes that carry pieces of rows by the bulk copy engine, each through a stage of its own in shared memory. Bytes that
// are under way so take no registers, and the warps' own work is to find addresses.
#pragma once

#include <cstdint>

#include "comm/team.cuh"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"

namespace dsv3rt {

constexpr int kCopyWarps = 2;  // the first of a block
constexpr int kCopyLanes = 8;  // of each of them
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

// By the copy warps of all blocks, which take items in turns: the pieces that `find` gives for them. `may_go` says when
// a piece may leave, and those that come next in its warp with it, which so never hold it up; `written` is told of
// each, by the lane that carried it, when it is where it goes.
template <typename Find, typename MayGo, typename Written>
__device__ __forceinline__ void carry(CopierStorage& storage, int num_items, Find find, MayGo may_go, Written written) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, copier = warp * kCopyLanes + min(lane, kCopyLanes - 1);
  char* stage = storage.stages[copier];
  Barrier& loaded = storage.loaded[copier];
  const int first = (blockIdx.x + gridDim.x * warp) * kCopyLanes, stride = gridDim.x * kCopiers;
  const auto mine = [&](int item) {
    return lane < kCopyLanes && item + lane < num_items ? find(item + lane) : decltype(find(0)){};
  };
  auto next = mine(first);
  uint32_t parity = 0;
  for (int item = first; item < num_items; item += stride) {
    const auto found = next;
    const Piece& piece = found.piece;
    while (__ballot_sync(0xffffffffu, piece.bytes != 0) != 0 &&
           __ballot_sync(0xffffffffu, piece.bytes != 0 && may_go(found)) == 0) {
    }
    if (piece.bytes != 0) {
      loaded.arrive_and_expect(piece.bytes);
      bulk_load(stage, piece.source, piece.bytes, loaded, L2Hint::kEvictFirst);
    }
    next = mine(item + stride);
    __syncwarp();
    if (piece.bytes != 0) {
      loaded.wait(parity);
      parity ^= 1;
      bulk_store(piece.target, stage, piece.bytes);
      tma_store_commit();
    }
    tma_store_wait_all();
    __syncwarp();
    if (piece.bytes != 0) written(found);
  }
}

}  // namespace dsv3rt
