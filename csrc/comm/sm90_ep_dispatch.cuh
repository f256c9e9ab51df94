// Dispatch in three kernels: `stage` lays this rank's tokens and choices out in its window, `place` (sm90_ep_place.cuh)
// finds the row of every choice of every rank that this rank's experts serve, `pull` reads those tokens from their
// ranks' windows. Those of other nodes are read where `put_tokens` (sm90_ep_rails.cuh) laid them, in a window of this
// node. A kernel takes a Team or, in a group of several nodes, a NodesTeam.
#pragma once

#include <cuda_bf16.h>

#include "comm/team.cuh"

namespace dsv3rt {

struct StageArgs {
  EpRows tokens;
  bool finds_route;
  const int64_t* choice;
  const float* weight;
  int num_tokens;
  int record_bytes;  // a row and its scales
};

struct PullArgs {
  EpRoute route;
  EpRows rows;
  const __nv_bfloat16* outputs;
  int record_bytes;
};

// ---- stage ----

// Packs a chunk's choices with their places, and counts them by expert. warp_counts: [kWarps][E] in shared memory.
__device__ inline void stage_chunk(const Team& team, const StageArgs& args, int chunk, uint8_t* warp_counts) {
  const int num_experts = team.shape.num_experts, num_choices = args.num_tokens * team.shape.top_k;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kWarps * num_experts; i += kThreads) warp_counts[i] = 0;
  __syncthreads();

  const int entry = chunk * kChunk + threadIdx.x;
  const int64_t given = entry < num_choices ? args.choice[entry] : 0;
  const bool valid = entry < num_choices && given >= 0 && given < num_experts;
  if (entry < num_choices && !valid) fail(team, {0, EpFault::kBadExpert, EpPhase::kStage, 0, num_experts, given});
  const int expert = valid ? int(given) : -1;
  const unsigned same = __match_any_sync(0xffffffffu, expert);
  const unsigned before = same & ((1u << lane) - 1);
  if (valid && before == 0) warp_counts[warp * num_experts + expert] = uint8_t(__popc(same));
  __syncthreads();

  if (entry < num_choices) {
    int place = __popc(before);
    for (int w = 0; valid && w < warp; ++w) place += warp_counts[w * num_experts + expert];
    const uint32_t packed = valid ? uint32_t(expert) << 16 | uint32_t(place) : kNoExpert;
    in_window<uint32_t>(team.self, team.at.choice)[entry] = packed;
  }
  int* counts = in_window<int>(team.self, team.at.chunk_starts) + int64_t(chunk) * num_experts;
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int count = 0;
    for (int w = 0; w < kWarps; ++w) count += warp_counts[w * num_experts + e];
    counts[e] = count;
  }
  __syncthreads();  // warp_counts is cleared next
}

// Counts of chunks become counts of all earlier chunks, in place; the last block's work.
__device__ inline void start_chunks(const Team& team, int num_chunks) {
  const int num_experts = team.shape.num_experts;
  int* starts = in_window<int>(team.self, team.at.chunk_starts);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int total = 0;
    for (int first = 0; first < num_chunks; first += 8) {
      int counts[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        counts[i] = first + i < num_chunks ? __ldcg(starts + int64_t(first + i) * num_experts + e) : 0;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (first + i < num_chunks) starts[int64_t(first + i) * num_experts + e] = total;
        total += counts[i];
      }
    }
    in_window<int>(team.self, team.at.totals)[e] = total;
  }
}

__device__ inline void stage_rows(const Team& team, const StageArgs& args) {
  const int lane = threadIdx.x % 32;
  const auto* tokens = static_cast<const char*>(args.tokens.data);
  for (int token = warp_in_grid(); token < args.num_tokens; token += warps_in_grid()) {
    char* record = team.self + team.at.tokens + int64_t(token) * args.record_bytes;
    copy_row(reinterpret_cast<uint4*>(record), reinterpret_cast<const uint4*>(tokens + token * args.tokens.row_stride),
             args.tokens.row_bytes / 16, lane);
    auto* scales = reinterpret_cast<float*>(record + args.tokens.row_bytes);
    for (int i = lane; i < args.tokens.num_scales; i += 32) {
      scales[i] = args.tokens.scale[i * args.tokens.scale_stride + token];
    }
  }
}

template <typename AnyTeam>
__global__ void __launch_bounds__(kThreads)
    ep_stage_kernel(const __grid_constant__ AnyTeam team, const __grid_constant__ StageArgs args) {
  extern __shared__ uint8_t warp_counts[];
  const uint64_t epoch = next_epoch(team, EpPhase::kStage);
  const int num_choices = args.num_tokens * team.shape.top_k;
  const int num_chunks = args.finds_route ? ceil_div(num_choices, kChunk) : 0;
  if (await_mates(team, EpPhase::kPull, epoch - 1)) {  // nobody reads the tokens before these any more
    for (int chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) stage_chunk(team, args, chunk, warp_counts);
    if (args.weight != nullptr) {
      float* weight = in_window<float>(team.self, team.at.weight);
      for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_choices; i += gridDim.x * kThreads) {
        weight[i] = args.weight[i];
      }
    }
    stage_rows(team, args);
  }
  if (!is_last_block(team, EpPhase::kStage) || has_failed(team)) return;
  if (args.finds_route) {
    start_chunks(team, num_chunks);
    if (threadIdx.x == 0) *in_window<int>(team.self, team.at.num_tokens) = args.num_tokens;
  }
  tell_peers(team, EpPhase::kStage, epoch);
}

// ---- pull ----

__device__ __forceinline__ void zero_row(const PullArgs& args, int64_t row, int lane) {
  auto* target = reinterpret_cast<uint4*>(static_cast<char*>(args.rows.data) + row * args.rows.row_stride);
  for (int i = lane; i < args.rows.row_bytes / 16; i += 32) target[i] = make_uint4(0, 0, 0, 0);
}

// target = weight * token, rounded to BF16; returns this lane's share of the product of token and output.
__device__ __forceinline__ float weigh(uint4 token, uint4 output, float weight, uint4& target) {
  const auto* tokens = reinterpret_cast<const __nv_bfloat162*>(&token);
  const auto* outputs = reinterpret_cast<const __nv_bfloat162*>(&output);
  auto* targets = reinterpret_cast<__nv_bfloat162*>(&target);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = __bfloat1622float2(tokens[i]), b = __bfloat1622float2(outputs[i]);
    dot = fmaf(a.x, b.x, fmaf(a.y, b.y, dot));
    targets[i] = __floats2bfloat162_rn(a.x * weight, a.y * weight);
  }
  return dot;
}

__device__ inline float weigh_row(uint4* target, const uint4* token, const uint4* output, float weight, int num_vectors,
                                  int lane) {
  constexpr int kUnroll = 4;
  float dot = 0.0f;
  for (int start = lane; start < num_vectors; start += 32 * kUnroll) {
    uint4 tokens[kUnroll], outputs[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (start + 32 * i >= num_vectors) continue;
      tokens[i] = load_shared_memory(token + start + 32 * i);
      outputs[i] = output[start + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (start + 32 * i >= num_vectors) continue;
      uint4 weighed;
      dot += weigh(tokens[i], outputs[i], weight, weighed);
      target[start + 32 * i] = weighed;
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
  return dot;
}

// A staged token: its row, and the scales behind it.
template <typename AnyTeam>
__device__ __forceinline__ const char* record_of(const AnyTeam& team, const PullArgs& args, int origin) {
  const int max_choices = team.shape.max_tokens * team.shape.top_k;
  const int token = origin % max_choices / team.shape.top_k;
  return staged_by(team, origin / max_choices) + team.at.tokens + int64_t(token) * args.record_bytes;
}

template <bool kWeighted, typename AnyTeam>
__device__ inline void pull_row(const AnyTeam& team, const PullArgs& args, int row, int origin, const char* record,
                                int lane) {
  if (origin < 0) return zero_row(args, row, lane);
  const auto* source = reinterpret_cast<const uint4*>(record);
  auto* target = reinterpret_cast<uint4*>(static_cast<char*>(args.rows.data) + row * args.rows.row_stride);
  const int num_vectors = args.rows.row_bytes / 16;
  if constexpr (kWeighted) {
    const int max_choices = team.shape.max_tokens * team.shape.top_k, entry = origin % max_choices;
    char* window = staged_by(team, origin / max_choices);
    const float weight = __ldcg(in_window<float>(window, team.at.weight) + entry);
    const auto* output = reinterpret_cast<const uint4*>(args.outputs + int64_t(row) * team.shape.num_columns);
    const float dot = weigh_row(target, source, output, weight, num_vectors, lane);
    if (lane == 0) in_window<float>(window, team.at.weight_grad)[entry] = dot;
  } else {
    copy_row(target, source, num_vectors, lane);
  }
}

struct PulledRow {
  int row, origin;
  const char* record;
};

// In the route's order.
template <bool kWeighted, typename AnyTeam>
__device__ inline void pull_rows(const AnyTeam& team, const PullArgs& args, int num_rows) {
  const auto look_up = [&](int i) -> PulledRow {
    if (i < 0) return {0, -1, nullptr};
    const int row = __ldg(args.route.order + i), origin = __ldg(args.route.origin + row);
    return {row, origin, origin < 0 ? nullptr : record_of(team, args, origin)};
  };
  in_turns(num_rows, look_up, [&](int, const PulledRow& found, int turn) {
    const int row = __shfl_sync(0xffffffffu, found.row, turn), origin = __shfl_sync(0xffffffffu, found.origin, turn);
    pull_row<kWeighted>(team, args, row, origin, address_of_lane(found.record, turn), threadIdx.x % 32);
  });
}

// Scales of 32 neighbouring rows, a row a lane, so that a store fills whole sectors. Zeros where there is padding.
template <typename AnyTeam>
__device__ inline void pull_scales(const AnyTeam& team, const PullArgs& args, int row) {
  constexpr int kUnroll = 7;
  const int origin = __ldg(args.route.origin + row), num_scales = args.rows.num_scales;
  const float4* source = nullptr;
  if (origin >= 0) source = reinterpret_cast<const float4*>(record_of(team, args, origin) + args.rows.row_bytes);
  float* target = args.rows.scale + row;
  for (int first = 0; first < num_scales; first += 4 * kUnroll) {
    float4 held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      held[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (origin >= 0 && first + 4 * i < num_scales) held[i] = __ldcg(source + first / 4 + i);
    }
#pragma unroll
    for (int i = 0; i < 4 * kUnroll; ++i) {
      const float4 four = held[i / 4];
      const float scale = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
      if (first + i < num_scales) target[(first + i) * args.rows.scale_stride] = scale;
    }
  }
}

// What comes after a dispatch may write into rooms: nobody may still fetch rows of what was combined before it.
__device__ inline bool await_rooms(const Team& team) {
  if (team.shape.max_rows == 0) return true;
  return await_peers(team, EpPhase::kReduce, next_epoch(team, EpPhase::kReduce) - 1);
}

template <bool kWeighted, typename AnyTeam>
__global__ void __launch_bounds__(kThreads)
    ep_pull_kernel(const __grid_constant__ AnyTeam team, const __grid_constant__ PullArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kPull);
  if (await_peers(team, EpPhase::kStage, epoch) && await_rooms(team)) {
    const int num_local = team.shape.num_experts / team.shape.num_ranks;
    const int num_rows = __ldg(args.route.offsets + num_local);
    pull_rows<kWeighted>(team, args, num_rows);
    const int scaled_rows = args.rows.num_scales > 0 ? num_rows : 0;
    for (int row = blockIdx.x * kThreads + threadIdx.x; row < scaled_rows; row += gridDim.x * kThreads) {
      pull_scales(team, args, row);
    }
  }
  if (is_last_block(team, EpPhase::kPull)) tell_peers(team, EpPhase::kPull, epoch);
}

// The weights' gradients that the experts' ranks left here; NaN where some did not.
__global__ void __launch_bounds__(kThreads)
    ep_weight_grad_kernel(const __grid_constant__ Team team, float* weight_grad, int num_choices) {
  const uint64_t epoch = next_epoch(team, EpPhase::kPull) - 1;
  const bool fine = await_peers(team, EpPhase::kPull, epoch);
  const float* arrived = in_window<float>(team.self, team.at.weight_grad);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_choices; i += gridDim.x * kThreads) {
    weight_grad[i] = fine ? __ldcg(arrived + i) : __int_as_float(0x7fffffff);
  }
}

}  // namespace dsv3rt
