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

// How finished tiles leave: through a buffer of their size, through one of half of it, or from registers.
enum class WayOut : uint8_t { kWhole, kHalves, kRegisters };

// When a stage of operands is free again: once its scales have been used, or, where these have a ring of their own,
// once it has been multiplied.
enum class ScaleRing : uint8_t { kOfStages, kOwn };

// Whether three consumers multiply as they come or one after the other. Those that wait for the same stage start
// together, share the tensor cores, and then promote together while these idle.
enum class Turns : uint8_t { kFree, kOrdered };

// The last wave of tiles, where it fills a part of the machine: as the others, or cut along the depth, so that every
// cluster gets as much of it. The parts of a tile add to D one after the other, always in the same order.
enum class LastWave : uint8_t { kWhole, kSpread };

template <int kBlockM_, int kBlockN_, Share kShare_, ScaleB kScaleB_, GemmOutput kOutput_, Grouping kGrouping_,
          WayOut kWayOut_ = WayOut::kWhole, ScaleRing kScaleRing_ = ScaleRing::kOfStages, Turns kTurns_ = Turns::kFree,
          LastWave kLastWave_ = LastWave::kWhole>
struct GemmConfig {
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_;
  static constexpr Share kShare = kShare_;
  static constexpr ScaleB kScaleB = kScaleB_;
  static constexpr GemmOutput kOutput = kOutput_;
  static constexpr Grouping kGrouping = kGrouping_;
  static constexpr WayOut kWayOut = kWayOut_;
  static constexpr bool kOwnScaleRing = kScaleRing_ == ScaleRing::kOwn;
  static constexpr bool kTakesTurns = kTurns_ == Turns::kOrdered;
  static constexpr bool kSpread = kLastWave_ == LastWave::kSpread;

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
  static constexpr int kParts = kWayOut == WayOut::kHalves ? 2 : 1;
  static constexpr int kPartBytes = kWaveBytes / kParts;
  static constexpr int kTileBytes = kWayOut == WayOut::kRegisters ? 128 : kBlockM / kWaveRows * kPartBytes;

  static constexpr int kPrefixInts = kGrouping == Grouping::kRows ? kMaxGroups + 1 : 1;
  static constexpr int kStageBytes =
      (kBlockM + kBlockN) * kBlockK + kBlockM * 4 + (kScaleB == ScaleB::kRow ? kBlockN * 4 : 0);
  static constexpr int kScaleBytes = kBlockM * 4 + round_up(kScaleBFloats * 4, 128);
  static constexpr int kStages =
      (kMaxSharedBytes - kTileBytes - kPrefixInts * 4 - 1024 - (kOwnScaleRing ? kScaleBytes : 0)) /
      ((kBlockM + kBlockN) * kBlockK + kScaleBytes + 16);
  // A warp that releases a stage has used the scales of the K-block before it: one slot more needs no barriers.
  static constexpr int kScaleSlots = kStages + (kOwnScaleRing ? 1 : 0);
  static constexpr bool kFits = kStages >= 3;

  static_assert(kBlockScales <= 2);
  static_assert(kBlockN % 64 == 0, "whole slabs");
  static_assert(kBlockM % (kWaveRows * kConsumers) == 0);
  static_assert(kWayOut == WayOut::kWhole || (kPairedRows && kOutput != GemmOutput::kBFloat16 && kWaves == 1));
  static_assert(!kOwnScaleRing || kScaleB == ScaleB::kRow);
  static_assert(!kSpread || (kWayOut != WayOut::kWhole && kOutput == GemmOutput::kFloat32Add &&
                             kGrouping == Grouping::kNone && kShare != Share::kDepth));
  static_assert(!kTakesTurns || (kConsumers == 3 && kScaleB == ScaleB::kRow));
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
