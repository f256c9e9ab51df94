// Combine without a copy: products have written the rows into a room of their rank's window, and the ranks of their
// tokens fetch them from there and sum them in the order of k, in FP32. Weights were applied by the experts.
#pragma once

#include "comm/sm90_ep_combine.cuh"

namespace dsv3rt {

struct FetchArgs {
  EpRoute route;
  int64_t rows;             // the first one's offset in every window, in a room
  int64_t row_weight_grad;  // the offset of its weight's gradient
  const uint32_t* place;    // [T * K]
  float* weight_grad;       // [T * K] or null
  __nv_bfloat16* tokens;
  int num_tokens;
};

inline FetchArgs fetch_args(const Team& team, const EpCombineParams& params) {
  return {params.route,
          room_offset(team.at, params.room) + params.first_row * team.shape.num_columns * 2,
          team.at.row_weight_grad + params.first_row * 4,
          params.place,
          params.weight_grad,
          static_cast<__nv_bfloat16*>(params.tokens),
          params.num_tokens};
}

// Of a token's rows that from `first` on which the lane has to find.
__device__ __forceinline__ FoundRow find_row(const Team& team, const FetchArgs& args, int token, int first) {
  const int lane = threadIdx.x % 32, k = first + lane;
  if (lane >= kSumRows || k >= team.shape.top_k) return {nullptr, 0.0f};
  const uint32_t place = __ldg(args.place + token * team.shape.top_k + k);
  const int64_t row = place & ((1u << kPlaceBits) - 1);
  return {in_window<const uint4>(team.peers[place >> kPlaceBits], args.rows + row * team.shape.num_columns * 2), 1.0f};
}

__device__ inline void fetch_weight_grads(const Team& team, const FetchArgs& args, bool complete) {
  const int num_choices = args.num_tokens * team.shape.top_k;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_choices; i += gridDim.x * kThreads) {
    float grad = __int_as_float(0x7fffffff);
    if (complete) {
      const uint32_t place = __ldg(args.place + i);
      const float* grads = in_window<const float>(team.peers[place >> kPlaceBits], args.row_weight_grad);
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
  const int num_vectors = team.shape.num_columns / 8;
  for (int token = warp_in_grid(); token < args.num_tokens; token += warps_in_grid()) {
    if (complete) {
      sum_token<false>(team, args.tokens, token, 0, num_vectors,
                       [&](int first) { return find_row(team, args, token, first); });
    } else {
      spoil_token(team, args.tokens, token, 0, num_vectors);
    }
  }
  if (args.weight_grad != nullptr) fetch_weight_grads(team, args, complete);
  if (is_last_block(team, EpPhase::kReduce)) tell_peers(team, EpPhase::kReduce, epoch);
}

}  // namespace dsv3rt
