// Combine without a copy: products have written the rows into a room of their rank's window, and the ranks of their
// tokens fetch them from there and sum them in the order of k, in FP32. Weights were applied by the experts.
#pragma once

#include <cuda_bf16.h>

#include "comm/sm90_ep_combine.cuh"

namespace dsv3rt {

struct FetchArgs {
  EpRoute route;
  int64_t room;           // its offset in every window
  const uint32_t* place;  // [T * K]
  float* weight_grad;     // [T * K] or null
  __nv_bfloat16* tokens;
  int num_tokens;
};

constexpr int kFetchRows = 8;  // under way together, of as many of a token's choices
constexpr int kFetchColumns = 2;

// The row of the lane's choice among a few of a token's from `first` on; null past the last.
__device__ __forceinline__ const uint4* find_row(const Team& team, const FetchArgs& args, int token, int first) {
  const int lane = threadIdx.x % 32, choice = first + lane;
  if (lane >= kFetchRows || choice >= team.shape.top_k) return nullptr;
  const uint32_t place = __ldg(args.place + token * team.shape.top_k + choice);
  const int64_t row = place & ((1u << kPlaceBits) - 1);
  return in_window<const uint4>(team.peers[place >> kPlaceBits], args.room + row * team.shape.num_columns * 2);
}

// Adds the rows that the first lanes have found. Their addresses stay with them: in all lanes they would fill
// registers.
__device__ __forceinline__ void add_rows(float (&sums)[kFetchColumns][8], const uint4* found, int column,
                                         int num_vectors) {
  uint4 held[kFetchColumns][kFetchRows];
  unsigned exist = 0;
#pragma unroll
  for (int i = 0; i < kFetchRows; ++i) {
    const auto row = reinterpret_cast<const uint4*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(found), i));
    if (row == nullptr) continue;
    exist |= 1u << i;
#pragma unroll
    for (int c = 0; c < kFetchColumns; ++c) {
      if (column + 32 * c < num_vectors) held[c][i] = load_shared_memory(row + column + 32 * c);
    }
  }
#pragma unroll
  for (int i = 0; i < kFetchRows; ++i) {
    if ((exist >> i & 1) == 0) continue;
#pragma unroll
    for (int c = 0; c < kFetchColumns; ++c) add_slot(sums[c], held[c][i], 1.0f);
  }
}

// One warp's work.
__device__ inline void fetch_token(const Team& team, const FetchArgs& args, int token) {
  const int num_vectors = team.shape.num_columns / 8, top_k = team.shape.top_k, lane = threadIdx.x % 32;
  const uint4* found = find_row(team, args, token, 0);
  auto* target = reinterpret_cast<uint4*>(args.tokens) + int64_t(token) * num_vectors;
  for (int start = 0; start < num_vectors; start += 32 * kFetchColumns) {
    const int column = start + lane;
    float sums[kFetchColumns][8] = {};
    add_rows(sums, found, column, num_vectors);
    for (int first = kFetchRows; first < top_k; first += kFetchRows) {
      add_rows(sums, find_row(team, args, token, first), column, num_vectors);
    }
#pragma unroll
    for (int c = 0; c < kFetchColumns; ++c) {
      if (column + 32 * c < num_vectors) target[column + 32 * c] = pack_bf16(sums[c]);
    }
  }
}

__device__ inline void fetch_weight_grads(const Team& team, const FetchArgs& args, bool complete) {
  const int num_choices = args.num_tokens * team.shape.top_k;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_choices; i += gridDim.x * kThreads) {
    float grad = __int_as_float(0x7fffffff);
    if (complete) {
      const uint32_t place = __ldg(args.place + i);
      const float* grads = in_window<const float>(team.peers[place >> kPlaceBits], team.at.row_weight_grad);
      grad = __ldcg(grads + (place & ((1u << kPlaceBits) - 1)));
    }
    args.weight_grad[i] = grad;
  }
}

__global__ void __launch_bounds__(kThreads)
    ep_fetch_kernel(const __grid_constant__ Team team, const __grid_constant__ FetchArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kReduce);
  if (blockIdx.x == 0 && await_peers(team, EpPhase::kReduce, epoch - 1)) {
    tell_overflow(team, args.route);
    tell_peers(team, EpPhase::kPush, epoch);  // what the products before this kernel wrote can be fetched
  }
  const bool fine = await_peers(team, EpPhase::kPush, epoch);
  const bool complete = all_arrived(team) && fine;
  for (int token = warp_in_grid(); token < args.num_tokens; token += warps_in_grid()) {
    complete ? fetch_token(team, args, token) : spoil_token(team, args.tokens, token);
  }
  if (args.weight_grad != nullptr) fetch_weight_grads(team, args, complete);
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
