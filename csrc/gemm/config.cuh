// Compile-time choices of a GEMM kernel and its shared memory.
#pragma once

#include "common/math.h"
#include "gemm/heuristics.h"
#include "gemm/params.h"
#include "hopper/barrier.cuh"
#include "hopper/ring.cuh"

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
  // In FP32 it leaves in two parts where that makes room for a fourth stage.
  static constexpr int kParts = kPairedRows && kOutput != GemmOutput::kBFloat16 && kConsumers == 3 ? 2 : 1;
  static constexpr int kPartBytes = kWaveBytes / kParts;
  static constexpr int kTileBytes = kBlockM / kWaveRows * kPartBytes;

  // With row scales two consumers multiply the next K-block while they promote one: of each two partial results.
  static constexpr bool kAhead = kScaleB == ScaleB::kRow && kConsumers == 2;
  static constexpr int kPartials = kAhead ? 2 : 1;

  // Row scales have a ring of their own with more slots, so that a stage is free once it has been multiplied. An
  // arrival does not wait for loads that are under way: a stage that is handed back right behind the last load of its
  // scales can be written before that load reads it. A warp that hands a stage back has multiplied into the registers
  // which the scales of `kPartials` K-blocks before were applied to, so those have been read.
  static constexpr bool kOwnScaleRing = kScaleB == ScaleB::kRow;
  static constexpr int kMoreScaleSlots = kOwnScaleRing ? kPartials : 0;

  static constexpr int kPrefixInts = kGrouping == Grouping::kRows ? kMaxGroups + 1 : 1;
  static constexpr int kStageBytes =
      (kBlockM + kBlockN) * kBlockK + kBlockM * 4 + (kScaleB == ScaleB::kRow ? kBlockN * 4 : 0);
  static constexpr int kScaleBytes = kBlockM * 4 + round_up(kScaleBFloats * 4, 128);
  static constexpr int kStages =
      (kMaxSharedBytes - kTileBytes - kPrefixInts * 4 - 1024 - kMoreScaleSlots * kScaleBytes) /
      ((kBlockM + kBlockN) * kBlockK + kScaleBytes + 16);
  static constexpr int kScaleSlots = kStages + kMoreScaleSlots;
  static constexpr bool kFits = kStages >= 3;

  static_assert(kBlockScales <= 2);
  static_assert(kBlockN % 64 == 0, "whole slabs");
  static_assert(kBlockM % (kWaveRows * kConsumers) == 0);
  static_assert(kParts == 1 || kWaves == 1);
};

// A K-block's place in the ring of operands, and in that of scales where they have their own.
template <typename C>
struct GemmRing : RingPosition<C::kStages> {
  RingPosition<C::kScaleSlots> scales;

  __device__ __forceinline__ uint32_t scale_slot() const { return C::kOwnScaleRing ? scales.stage : this->stage; }

  __device__ __forceinline__ void advance() {
    RingPosition<C::kStages>::advance();
    if (C::kOwnScaleRing) scales.advance();
  }
};

template <typename C>
struct GemmStorage {
  alignas(1024) uint8_t a[C::kStages][C::kBlockM * kBlockK];
  alignas(1024) uint8_t b[C::kStages][C::kBlockN * kBlockK];
  alignas(1024) uint8_t tile[C::kTileBytes];
  alignas(128) float scale_a[C::kScaleSlots][C::kBlockM];
  alignas(128) float scale_b[C::kScaleSlots][C::kScaleBFloats];
  Barrier full[C::kStages];
  Barrier empty[C::kStages];
  int block_prefix[C::kPrefixInts];
};

}  // namespace dsv3rt
