// The sum of a token's slots, in the order of k, in FP32.
#pragma once

#include <cuda_bf16.h>

#include "comm/team.cuh"

namespace dsv3rt {

struct SumArgs {
  const float* weight;
  __nv_bfloat16* tokens;
  int num_tokens;
};

// A warp sums this many columns of a token at a time.
constexpr int kPartVectors = 2;
constexpr int kPartColumns = 32 * 8 * kPartVectors;

// Fused, as the reference's addcmul is.
__device__ __forceinline__ void add_slot(float (&sum)[8], uint4 slot, float weight) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&slot);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    sum[2 * i] = fmaf(pair.x, weight, sum[2 * i]);
    sum[2 * i + 1] = fmaf(pair.y, weight, sum[2 * i + 1]);
  }
}

__device__ __forceinline__ uint4 round_sum(const float (&sum)[8]) {
  uint4 rounded;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&rounded);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
  return rounded;
}

// Part of a token, from slots [T * K][D]: all loads of eight slots are under way at once.
__device__ inline void sum_part(const Team& team, const SumArgs& args, const uint4* slots, int token, int part) {
  constexpr int kUnroll = 8;
  const int num_vectors = team.shape.num_columns / 8, top_k = team.shape.top_k;
  const int start = part * 32 * kPartVectors + threadIdx.x % 32;
  const uint4* slot = slots + int64_t(token) * top_k * num_vectors + start;
  float sum[kPartVectors][8] = {};
  for (int first = 0; first < top_k; first += kUnroll) {
    uint4 held[kUnroll][kPartVectors];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int v = 0; v < kPartVectors; ++v) {
        const bool there = first + i < top_k && start + 32 * v < num_vectors;
        if (there) held[i][v] = load_shared_memory(slot + int64_t(first + i) * num_vectors + 32 * v);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i >= top_k) continue;
      const float weight = args.weight != nullptr ? __ldg(args.weight + token * top_k + first + i) : 1.0f;
#pragma unroll
      for (int v = 0; v < kPartVectors; ++v) add_slot(sum[v], held[i][v], weight);
    }
  }
  uint4* target = reinterpret_cast<uint4*>(args.tokens) + int64_t(token) * num_vectors + start;
#pragma unroll
  for (int v = 0; v < kPartVectors; ++v) {
    if (start + 32 * v < num_vectors) target[32 * v] = round_sum(sum[v]);
  }
}

// An error was reported; nobody may take what is there for a result.
__device__ inline void spoil_part(const Team& team, const SumArgs& args, int token, int part) {
  const int num_vectors = team.shape.num_columns / 8, start = part * 32 * kPartVectors + threadIdx.x % 32;
  uint4* target = reinterpret_cast<uint4*>(args.tokens) + int64_t(token) * num_vectors;
  for (int i = start; i < min(start + 32 * kPartVectors, num_vectors); i += 32)
    target[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
}

// ---- rows that a peer had no room for ----

// By the last threads that look: tells mates whether this rank's experts had room. Follow it with a signal.
__device__ __forceinline__ void tell_overflow(const Team& team, const EpRoute& route, int peer) {
  const int64_t needed = __ldg(route.rows_needed);
  int64_t* told = in_window<int64_t>(team.peers[peer], team.at.overflows) + 2 * team.shape.rank;
  told[0] = needed > route.capacity ? needed : 0;
  told[1] = route.capacity;
}

// Whether `peer` had room for all rows.
__device__ inline bool had_room(const Team& team, int peer) {
  const int64_t* told = in_window<int64_t>(team.self, team.at.overflows) + 2 * peer;
  const int64_t needed = __ldcg(told);
  if (needed != 0) fail(team, {0, EpFault::kPeerOverflow, EpPhase::kReduce, peer, __ldcg(told + 1), needed});
  return needed == 0;
}

}  // namespace dsv3rt
