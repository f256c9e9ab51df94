// Compile-time choices of a GEMM kernel and its shared memory.
#pragma once

#include "common/math.h"
#include "gemm/heuristics.h"
#include "gemm/params.h"
#include "hopper/barrier.cuh"

namespace dsv3rt {

constexpr int kBlockK = 128;
constexpr int kConsumerWarps = 8;
constexpr int kGemmThreads = 128 + 32 * kConsumerWarps;
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
  static constexpr int kWaves = kBlockM / 128;      // 64-row waves of each consumer warpgroup
  static constexpr int kFragment = kBlockN / 2;     // accumulators a thread and wave
  static constexpr int kBlockScales = kScaleB == ScaleB::kBlock128 ? blocks_touched(kBlockN) : 1;
  static constexpr int kScaleBFloats = kScaleB == ScaleB::kRow ? round_up(kBlockN, 32) : 4;  // a stage
  static constexpr int kPrefixInts = kGrouping == Grouping::kRows ? kMaxGroups + 1 : 1;
  static constexpr int kStageBytes =
      (kBlockM + kBlockN) * kBlockK + kBlockM * 4 + (kScaleB == ScaleB::kRow ? kBlockN * 4 : 0);
  static constexpr int kStages = (kMaxSharedBytes - 1024 - kPrefixInts * 4 - 256) /
                                 ((kBlockM + kBlockN) * kBlockK + kBlockM * 4 + kScaleBFloats * 4);

  static_assert(kBlockScales <= 2);
  static_assert(kBlockN % 32 == 0, "the epilogue transposes four octets at a time");
  static_assert(kBlockM == 128 || kBlockM == 256);
  static_assert(kWaves * kFragment + kFragment <= 192, "accumulators must leave registers for the rest");
};

template <typename C>
struct GemmStorage {
  alignas(1024) uint8_t a[C::kStages][C::kBlockM * kBlockK];
  alignas(1024) uint8_t b[C::kStages][C::kBlockN * kBlockK];
  alignas(128) float scale_a[C::kStages][C::kBlockM];
  alignas(128) float scale_b[C::kStages][C::kScaleBFloats];
  Barrier full[C::kStages];
  Barrier empty[C::kStages];
  int block_prefix[C::kPrefixInts];
};

}  // namespace dsv3rt
