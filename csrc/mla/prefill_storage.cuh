// Shared memory of the prefill kernel. An operand is 64-column slabs of 128-byte rows in 128-byte swizzle.
#pragma once

#include <cuda_bf16.h>

#include "hopper/barrier.cuh"
#include "mla/params.h"
#include "mla/query_tiles.cuh"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kTileKeys = 128;  // of a block
constexpr int kKeyStages = 2;
constexpr int kPrefillConsumers = 2;  // warpgroups of 64 queries
constexpr int kPrefillConsumerWarps = 4 * kPrefillConsumers;
constexpr int kPrefillThreads = 128 + 32 * kPrefillConsumerWarps;

using PrefillTile = QueryTile<kTileKeys>;
using QuerySlab = __nv_bfloat16[kTileQueries * kSlab];
using KeySlab = __nv_bfloat16[kTileKeys * kSlab];

struct PrefillStorage {
  alignas(1024) QuerySlab q[kQueryDim / kSlab];
  alignas(1024) KeySlab k[kKeyStages][kQueryDim / kSlab];  // two slabs of nope, one of rope
  alignas(1024) KeySlab v[kKeyStages][kValueDim / kSlab];
  Barrier q_full, q_empty;
  Barrier k_full[kKeyStages], k_empty[kKeyStages];
  Barrier v_full[kKeyStages], v_empty[kKeyStages];
  Barrier tile_full[kTileSlots], tile_empty[kTileSlots];
  PrefillTile tile[kTileSlots];
};
static_assert(kKeyStages == 2 && kTileSlots == 2);

}  // namespace dsv3rt
