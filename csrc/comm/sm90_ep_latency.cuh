// The low-latency form, for decoding: halves that send do not wait for peers' data, halves that receive come later, and
// nothing occupies an SM between them.
//
// `send` casts tokens to FP8 and writes each once into the window of every rank that needs it, with all choices;
// `receive` finds the rows of its experts there. `send_back` writes rows into the slots of the tokens' ranks, `collect`
// sums them. All of it lies twice in the windows: a rank may send again before its peers have received, twice at most.
#pragma once

#include "comm/sm90_ep_combine.cuh"
#include "common/fp8_cast.cuh"

namespace dsv3rt {

// What has arrived, or is to be sent, in the epochs of one parity.
__device__ __forceinline__ int64_t sender_index(const Team& team, uint64_t epoch, int sender) {
  return int64_t(epoch & 1) * team.shape.num_ranks + sender;
}

__device__ __forceinline__ uint32_t* arrived_choices(const Team& team, char* window, uint64_t epoch, int sender) {
  return in_window<uint32_t>(window, team.at.arrived_choice) +
         sender_index(team, epoch, sender) * padded_choices(team.shape);
}

__device__ __forceinline__ char* arrived_token(const Team& team, char* window, uint64_t epoch, int sender, int token) {
  const int64_t index = sender_index(team, epoch, sender) * team.shape.max_tokens + token;
  return window + team.at.arrived_tokens + index * latency_record_bytes(team.shape);
}

__device__ __forceinline__ char* returned_slots(const Team& team, char* window, uint64_t epoch) {
  const int64_t choices = int64_t(team.shape.max_tokens) * team.shape.top_k;
  return window + team.at.returned_slots + int64_t(epoch & 1) * choices * team.shape.num_columns * 2;
}

// The epoch whose buffers come to be used again; peers must be done with it.
__device__ __forceinline__ uint64_t epoch_before_last(uint64_t epoch) { return epoch < 2 ? 0 : epoch - 2; }

// ---- send ----

struct SendArgs {
  const __nv_bfloat16* tokens;  // (T, D)
  const int64_t* choice;
  int num_tokens;
};

// Every rank gets all choices, and kNoExpert where there is none.
__device__ inline void send_choices(const Team& team, const SendArgs& args, uint64_t epoch) {
  const int padded = padded_choices(team.shape), num_choices = args.num_tokens * team.shape.top_k;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < padded; i += gridDim.x * kThreads) {
    const int64_t given = i < num_choices ? args.choice[i] : 0;
    const bool valid = given >= 0 && given < team.shape.num_experts;
    if (!valid) fail(team, {0, EpFault::kBadExpert, EpPhase::kSend, 0, team.shape.num_experts, given});
    const uint32_t told = valid && i < num_choices ? uint32_t(given) : kNoExpert;
    for (int r = 0; r < team.shape.num_ranks; ++r) {
      arrived_choices(team, team.peers[r], epoch, team.shape.rank)[i] = told;
    }
  }
}

// Bit r: some expert of the token lives at rank r. The same in all lanes.
__device__ __forceinline__ uint64_t ranks_of_token(const Team& team, const SendArgs& args, int token, int lane) {
  const int num_experts = team.shape.num_experts, num_local = num_experts / team.shape.num_ranks;
  uint64_t ranks = 0;
  for (int k = lane; k < team.shape.top_k; k += 32) {
    const int64_t expert = args.choice[int64_t(token) * team.shape.top_k + k];
    if (expert >= 0 && expert < num_experts) ranks |= uint64_t(1) << (int(expert) / num_local);
  }
  const unsigned low = __reduce_or_sync(0xffffffffu, unsigned(ranks));
  const unsigned high = __reduce_or_sync(0xffffffffu, unsigned(ranks >> 32));
  return uint64_t(high) << 32 | low;
}

// A warp casts 512 columns of a token: 16 a lane, eight lanes a tile.
constexpr int kSendColumns = 512;

__device__ inline void send_columns(const Team& team, const SendArgs& args, uint64_t epoch, int token, int first) {
  const int lane = threadIdx.x % 32, column = first + 16 * lane, num_columns = team.shape.num_columns;
  const bool inside = column < num_columns;
  Octet<__nv_bfloat16> octets[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    octets[i].clear();
    if (inside) octets[i].load(args.tokens + int64_t(token) * num_columns + column + 8 * i);
  }
  uint32_t amax = max(octets[0].amax_bits(), octets[1].amax_bits());
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
  const TileScale scale = tile_scale(amax, 0);
  const uint2 low = quantize_octet(octets[0], scale.inverse), high = quantize_octet(octets[1], scale.inverse);
  for (uint64_t left = ranks_of_token(team, args, token, lane); left != 0; left &= left - 1) {
    char* record = arrived_token(team, team.peers[__ffsll(left) - 1], epoch, team.shape.rank, token);
    if (!inside) continue;
    *reinterpret_cast<uint4*>(record + column) = make_uint4(low.x, low.y, high.x, high.y);
    if (lane % 8 == 0) reinterpret_cast<float*>(record + num_columns)[column / kTile] = scale.scale;
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    ep_send_kernel(const __grid_constant__ Team team, const __grid_constant__ SendArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kSend);
  if (await_peers(team, EpPhase::kReceive, epoch_before_last(epoch))) {
    send_choices(team, args, epoch);
    const int parts = ceil_div(team.shape.num_columns, kSendColumns);
    for (int i = warp_in_grid(); i < args.num_tokens * parts; i += warps_in_grid()) {
      send_columns(team, args, epoch, i / parts, i % parts * kSendColumns);
    }
  }
  if (is_last_block(team, EpPhase::kSend)) tell_peers(team, EpPhase::kSend, epoch);
}

// ---- receive ----

struct ReceiveArgs {
  EpMaskedRoute route;
  EpRows rows;
};

__device__ inline void receive_row(const Team& team, const ReceiveArgs& args, uint64_t epoch, int sender, int entry,
                                   int64_t row) {
  const int lane = threadIdx.x % 32;
  const char* record = arrived_token(team, team.self, epoch, sender, entry / team.shape.top_k);
  copy_row(reinterpret_cast<uint4*>(static_cast<char*>(args.rows.data) + row * args.rows.row_stride),
           reinterpret_cast<const uint4*>(record), args.rows.row_bytes / 16, lane);
  const auto* scales = reinterpret_cast<const float*>(record + args.rows.row_bytes);
  for (int i = lane; i < args.rows.num_scales; i += 32) {
    args.rows.scale[i * args.rows.scale_stride + row] = __ldcg(scales + i);
  }
  if (lane == 0) args.route.origin[row] = sender * team.shape.max_tokens * team.shape.top_k + entry;
}

// The lanes of a warp hold one entry each of 32 neighbours among all senders' choices; none crosses to the next sender.
__device__ __forceinline__ unsigned hits(const Team& team, uint64_t epoch, int first, int expert) {
  const uint32_t* choice = arrived_choices(team, team.self, epoch, 0);  // those of the senders follow one another
  return __ballot_sync(0xffffffffu, __ldcg(choice + first + threadIdx.x % 32) == uint32_t(expert));
}

// The rows of one expert in the order (sender, token, k), of which this block copies those whose number is `part`
// modulo `num_parts`. Each warp takes a run of the choices: it counts, hears how many earlier warps have, and copies.
__device__ inline void receive_expert(const Team& team, const ReceiveArgs& args, uint64_t epoch, int local, int part,
                                      int num_parts) {
  __shared__ int warp_counts[kWarps];
  const int expert = team.shape.rank * (team.shape.num_experts / team.shape.num_ranks) + local;
  const int padded = padded_choices(team.shape), num_entries = team.shape.num_ranks * padded;
  const int run = round_up(ceil_div(num_entries, kWarps), 32), warp = threadIdx.x / 32;
  const int first = min(warp * run, num_entries), last = min(first + run, num_entries);
  int count = 0;
  for (int i = first; i < last; i += 32) count += __popc(hits(team, epoch, i, expert));
  if (threadIdx.x % 32 == 0) warp_counts[warp] = count;
  __syncthreads();
  int number = 0, total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) number += warp_counts[w];
    total += warp_counts[w];
  }
  __syncthreads();  // warp_counts is written next
  const int capacity = args.route.capacity;
  for (int i = first; i < last; i += 32) {
    for (unsigned left = hits(team, epoch, i, expert); left != 0; left &= left - 1, ++number) {
      if (number % num_parts != part || number >= capacity) continue;
      const int entry = i + __ffs(left) - 1;
      receive_row(team, args, epoch, entry / padded, entry % padded, int64_t(local) * capacity + number);
    }
  }
  if (part != 0 || threadIdx.x != 0) return;
  args.route.counts[local] = min(total, capacity);
  if (total > capacity) fail(team, {0, EpFault::kOverflow, EpPhase::kReceive, team.shape.rank, capacity, total});
}

__global__ void __launch_bounds__(kThreads)
    ep_receive_kernel(const __grid_constant__ Team team, const __grid_constant__ ReceiveArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kReceive);
  const int num_local = team.shape.num_experts / team.shape.num_ranks;
  const int num_parts = max(1, int(gridDim.x) / num_local);
  const bool fine = await_peers(team, EpPhase::kSend, epoch);
  for (int i = blockIdx.x; i < num_local * num_parts; i += gridDim.x) {
    const int local = i % num_local, part = i / num_local;
    if (fine) {
      receive_expert(team, args, epoch, local, part, num_parts);
    } else if (part == 0 && threadIdx.x == 0) {
      args.route.counts[local] = 0;
    }
  }
  if (is_last_block(team, EpPhase::kReceive)) tell_peers(team, EpPhase::kReceive, epoch);
}

// ---- the way back ----

struct SendBackArgs {
  EpMaskedRoute route;
  const char* rows;  // (X * capacity, D) BF16
};

__global__ void __launch_bounds__(kThreads)
    ep_send_back_kernel(const __grid_constant__ Team team, const __grid_constant__ SendBackArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kSendBack);
  if (await_peers(team, EpPhase::kCollect, epoch_before_last(epoch))) {
    const int num_local = team.shape.num_experts / team.shape.num_ranks, warps = warps_in_grid();
    const int row_bytes = team.shape.num_columns * 2, max_choices = team.shape.max_tokens * team.shape.top_k;
    int mine = warp_in_grid();  // this warp's next row, counted from the expert's first
    for (int x = 0; x < num_local; ++x) {
      const int count = __ldg(args.route.counts + x);
      for (; mine < count; mine += warps) {
        const int64_t row = int64_t(x) * args.route.capacity + mine;
        const int origin = __ldg(args.route.origin + row);
        char* slots = returned_slots(team, team.peers[origin / max_choices], epoch);
        copy_row(reinterpret_cast<uint4*>(slots + int64_t(origin % max_choices) * row_bytes),
                 reinterpret_cast<const uint4*>(args.rows + row * row_bytes), row_bytes / 16, threadIdx.x % 32);
      }
      mine -= count;
    }
  }
  if (is_last_block(team, EpPhase::kSendBack)) tell_peers(team, EpPhase::kSendBack, epoch);
}

__global__ void __launch_bounds__(kThreads)
    ep_collect_kernel(const __grid_constant__ Team team, const __grid_constant__ ReduceArgs args) {
  const uint64_t epoch = next_epoch(team, EpPhase::kCollect);
  const bool fine = await_peers(team, EpPhase::kSendBack, epoch);
  const auto* slots = reinterpret_cast<const uint4*>(returned_slots(team, team.self, epoch));
  const int parts = ceil_div(team.shape.num_columns / 8, kSumSpan);
  for (int i = warp_in_grid(); i < args.num_tokens * parts; i += warps_in_grid()) {
    const int token = i / parts, start = i % parts * kSumSpan;
    if (fine) {
      reduce_token(team, args, slots, token, start, start + kSumSpan);
    } else {
      spoil_token(team, args.tokens, token, start, start + kSumSpan);
    }
  }
  if (is_last_block(team, EpPhase::kCollect)) tell_peers(team, EpPhase::kCollect, epoch);
}

}  // namespace dsv3rt
