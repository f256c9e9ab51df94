// Compile-time choices of a GEMM kernel and its shared memory.
#pragma once

#include "common/math.h"
#include "gemm/heuristics.h"
#include "gemm/params.h"
#include "hopper/barrier.cuh"

namespace dsv3rt {

constexpr int kBlockK = 128;
constexpr int kWaveRows = 64;  // of one wgmma
constexpr int kMaxGroups = 512;
constexpr int kMaxSharedBytes = 232448;

DSV3RT_HOST_DEVICE constexpr int gcd(int x, int y) { return y == 0 ? x : gcd(y, x % y); }

// 128-column blocks that a tile of `block_n` columns can touch, over all its positions.
constexpr int blocks_touched(int block_n) { return (128 - gcd(block_n, 128) + block_n + 127) / 128; }

template <int kBlockM_, int kBlockN_, Share kShare_, ScaleB kScaleB_, GemmOutput kOutput_, Grouping kGrouping_>
struct GemmConfig {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr Share kShare = kShare_;
  static constexpr ScaleB kScaleB = kScaleB_;
  static constexpr GemmOutput kOutput = kOutput_;
  static constexpr Grouping kGrouping = kGrouping_;

  static constexpr int kClusterSize = kShare == Share::kNone ? 1 : 2;
  static constexpr bool kMulticast = kShare == Share::kA || kShare == Share::kB;
  static constexpr int kConsumers = kBlockM == 192 ? 3 : 2;  // warpgroups that multiply
  static constexpr int kThreads = 128 + 128 * kConsumers;
  static constexpr int kWaves = kBlockM / kWaveRows / kConsumers;  // of each consumer
  static constexpr int kFragment = kBlockN / 2;                    // accumulators a thread and wave
  static constexpr bool kPairedRows = kScaleB == ScaleB::kRow && pairs_rows({kBlockM, kBlockN});
  static constexpr int kBlockScales = kScaleB == ScaleB::kBlock128 ? blocks_touched(kBlockN) : 1;
  static constexpr int kScaleBFloats = kScaleB == ScaleB::kRow ? kBlockN : 4;  // a stage

  // The finished tile waits in shared memory, as slabs of 64 rows of 128 bytes, for the copy engine to take it away.
  static constexpr int kElementBytes = kOutput == GemmOutput::kBFloat16 ? 2 : 4;
  static constexpr int kSlabColumns = 128 / kElementBytes;
  static constexpr int kSlabBytes = kWaveRows * 128;
  static constexpr int kWaveBytes = kBlockN / kSlabColumns * kSlabBytes;
  static constexpr int kTileBytes = kBlockM / kWaveRows * kWaveBytes;

  static constexpr int kPrefixInts = kGrouping == Grouping::kRows ? kMaxGroups + 1 : 1;
  static constexpr int kStageBytes =
      (kBlockM + kBlockN) * kBlockK + kBlockM * 4 + (kScaleB == ScaleB::kRow ? kBlockN * 4 : 0);
  static constexpr int kStages = (kMaxSharedBytes - kTileBytes - kPrefixInts * 4 - 1024) /
                                 ((kBlockM + kBlockN) * kBlockK + kBlockM * 4 + round_up(kScaleBFloats * 4, 128) + 16);
  static constexpr bool kFits = kStages >= 3;

  static_assert(kBlockScales <= 2);
  static_assert(kBlockN % 64 == 0, "whole slabs");
  static_assert(kBlockM % (kWaveRows * kConsumers) == 0);
};

template <typename C>
struct GemmStorage {
  alignas(1024) uint8_t a[C::kStages][C::kBlockM * kBlockK];
  alignas(1024) uint8_t b[C::kStages][C::kBlockN * kBlockK];
  alignas(1024) uint8_t tile[C::kTileBytes];
  alignas(128) float scale_a[C::kStages][C::kBlockM];
  alignas(128) float scale_b[C::kStages][C::kScaleBFloats];
  Barrier full[C::kStages];
  Barrier empty[C::kStages];
  int block_prefix[C::kPrefixInts];
};

}  // namespace dsv3rt
