// The second step of a dispatch: `place` finds the row of every choice of every rank that this rank's experts serve.
//
// Rows of an expert lie in the order (rank, token, k). A row's number is a sum of counts: offset of the expert, choices
// of earlier ranks, of earlier chunks of its rank, of earlier entries of its chunk. No step depends on who came first.
//
// Rows travel in another order: by the numbers of their tokens, 32 choices of each rank in turn. So all ranks are at
// about the same tokens at about the same time, and what one has read from memory others find in the L2.
#pragma once

#include <type_traits>

#include "comm/team.cuh"

namespace dsv3rt {

struct PlaceArgs {
  EpRoute route;
  float* row_weight;
  uint32_t* place;
};

constexpr int kTurns = 8;  // so many ranks' choices are placed at a time

// In shared memory, for this rank's X experts.
struct Places {
  int* starts;  // [R][X] first the choices of each rank, then of all earlier ranks
  int* counts;  // [X]
  int* offsets;  // [X + 1]
  int* rows_before;  // [X + 1] rows of earlier experts, without padding
  int* num_choices;  // [R] of all experts
  int* in_turn;  // [kWarps][kTurns] of one chunk, for this rank's experts
  int* before_chunk;  // [kWarps] the same of all chunks ahead of one
};

inline int place_shared_ints(const EpShape& shape) {
  const int num_local = shape.num_experts / shape.num_ranks;
  const int of_places = shape.num_experts + 3 * num_local + 2 + shape.num_ranks + kWarps * (kTurns + 1);
  return of_places > 2 * shape.num_experts ? of_places : 2 * shape.num_experts;
}

__device__ inline Places places_in(int* shared, const EpShape& shape) {
  const int num_local = shape.num_experts / shape.num_ranks;
  Places places;
  places.starts = shared;
  places.counts = places.starts + shape.num_experts;
  places.offsets = places.counts + num_local;
  places.rows_before = places.offsets + num_local + 1;
  places.num_choices = places.rows_before + num_local + 1;
  places.in_turn = places.num_choices + shape.num_ranks;
  places.before_chunk = places.in_turn + kWarps * kTurns;
  return places;
}

template <typename AnyTeam>
__device__ inline void sum_counts(const AnyTeam& team, const Places& places, int block) {
  const int num_ranks = team.shape.num_ranks, num_local = team.shape.num_experts / num_ranks;
  for (int i = threadIdx.x; i < num_ranks * num_local; i += kThreads) {
    const int* totals = in_window<int>(staged_by(team, i / num_local), team.at.totals);
    places.starts[i] = __ldcg(totals + team.shape.rank * num_local + i % num_local);
  }
  for (int r = threadIdx.x; r < num_ranks; r += kThreads) {
    places.num_choices[r] = __ldcg(in_window<int>(staged_by(team, r), team.at.num_tokens)) * team.shape.top_k;
  }
  __syncthreads();
  for (int x = threadIdx.x; x < num_local; x += kThreads) {
    int total = 0;
    for (int r = 0; r < num_ranks; ++r) {
      const int count = places.starts[r * num_local + x];
      places.starts[r * num_local + x] = total;
      total += count;
    }
    places.counts[x] = total;
  }
  __syncthreads();
  for (int x = threadIdx.x; x <= num_local; x += kThreads) {
    int offset = 0, rows = 0;
    for (int earlier = 0; earlier < x; ++earlier) {
      offset += round_up(places.counts[earlier], block);
      rows += places.counts[earlier];
    }
    places.offsets[x] = offset;
    places.rows_before[x] = rows;
  }
  __syncthreads();
}

// The layout as the grouped products see it. Rows past the capacity are not there: what does not fit is left out of the
// counts too, and reported.
__device__ inline void write_layout(const Team& team, const PlaceArgs& args, const Places& places, bool fine) {
  const int num_local = team.shape.num_experts / team.shape.num_ranks;
  const int capacity = int(args.route.capacity);
  for (int x = threadIdx.x; x <= num_local; x += kThreads) {
    const int offset = fine ? min(places.offsets[x], capacity) : 0;
    args.route.offsets[x] = offset;
    if (x < num_local) args.route.counts[x] = fine ? min(places.counts[x], capacity - offset) : 0;
  }
  if (threadIdx.x != 0) return;
  const int needed = fine ? places.offsets[num_local] : 0;
  *args.route.rows_needed = needed;
  if (needed > capacity) report(team, {0, EpFault::kOverflow, EpPhase::kPull, team.shape.rank, capacity, needed});
}

// Choices of all ranks in the chunks ahead of this one, for this rank's experts; by one warp.
template <typename AnyTeam>
__device__ inline int rows_before_chunk(const AnyTeam& team, const Places& places, int chunk) {
  const int num_ranks = team.shape.num_ranks, num_local = team.shape.num_experts / num_ranks;
  int before = 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < num_ranks * num_local; i += 32) {
    const int r = i / num_local;
    char* window = staged_by(team, r);
    const int* counts = in_window<int>(window, team.at.totals);
    if (chunk * kChunk < places.num_choices[r]) {
      counts = in_window<int>(window, team.at.chunk_starts) + int64_t(chunk) * team.shape.num_experts;
    }
    before += __ldcg(counts + team.shape.rank * num_local + i % num_local);
  }
  for (int distance = 16; distance > 0; distance /= 2) before += __shfl_xor_sync(0xffffffffu, before, distance);
  return before;
}

// Numbers of rows in each warp's choices become numbers of all rows before them, in the order of (warp, turn). By one
// warp; returns the number of all to its last lane.
__device__ inline int start_turns(int* in_turn) {
  constexpr int kEach = kWarps * kTurns / 32;
  int* mine = in_turn + threadIdx.x % 32 * kEach;
  int total = 0;
  for (int i = 0; i < kEach; ++i) total += mine[i];
  int end = total;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int earlier = __shfl_up_sync(0xffffffffu, end, distance);
    if (int(threadIdx.x % 32) >= distance) end += earlier;
  }
  int start = end - total;
  for (int i = 0; i < kEach; ++i) {
    const int count = mine[i];
    mine[i] = start;
    start += count;
  }
  return end;
}

// The places of a chunk of choices of several ranks, those of `turn` on; each rank begins with itself, so that they do
// not all turn to one of them at a time. `before`, shared: rows ahead of these in the order; moves on.
template <typename AnyTeam>
__device__ inline void place_chunk(const AnyTeam& team, const PlaceArgs& args, const Places& places, int chunk,
                                   int turn, int& before) {
  const int num_ranks = team.shape.num_ranks, num_experts = team.shape.num_experts;
  const int num_local = num_experts / num_ranks, first = team.shape.rank * num_local;
  const int entry = chunk * kChunk + threadIdx.x, warp = threadIdx.x / 32;
  const unsigned lanes_before = (1u << threadIdx.x % 32) - 1;
  uint32_t packed[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int r = (team.shape.rank + turn + i) % num_ranks;
    packed[i] = kNoExpert;
    if (turn + i < num_ranks && entry < places.num_choices[r]) {
      packed[i] = __ldcg(in_window<uint32_t>(staged_by(team, r), team.at.choice) + entry);
    }
  }
  int row[kTurns], place[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int r = (team.shape.rank + turn + i) % num_ranks, x = int(packed[i] >> 16) - first;
    const bool here = packed[i] != kNoExpert && x >= 0 && x < num_local;
    row[i] = -1;
    if (here) {
      const int* chunk_starts = in_window<int>(staged_by(team, r), team.at.chunk_starts);
      const int earlier = __ldcg(chunk_starts + int64_t(chunk) * num_experts + first + x);
      row[i] = places.offsets[x] + places.starts[r * num_local + x] + earlier + int(packed[i] & 0xffff);
    }
    const unsigned all = __ballot_sync(0xffffffffu, here);
    place[i] = __popc(all & lanes_before);
    if (threadIdx.x % 32 == 0) places.in_turn[warp * kTurns + i] = __popc(all);
  }
  __syncthreads();
  const int rows_before = before;
  int end = 0;
  if (warp == 0) end = start_turns(places.in_turn);
  __syncthreads();
  if (threadIdx.x == 31) before = rows_before + end;
  const int max_choices = team.shape.max_tokens * team.shape.top_k, capacity = int(args.route.capacity);
  const bool fits = places.offsets[num_local] <= capacity;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (row[i] < 0 || row[i] >= capacity) continue;
    const int r = (team.shape.rank + turn + i) % num_ranks;
    args.route.origin[row[i]] = r * max_choices + entry;
    if (fits) args.route.order[rows_before + places.in_turn[warp * kTurns + i] + place[i]] = row[i];
    if (args.row_weight != nullptr) {
      args.row_weight[row[i]] = __ldcg(in_window<float>(staged_by(team, r), team.at.weight) + entry);
    }
  }
  __syncthreads();  // in_turn and before are used next
}

// A warp for each of the block's next chunks counts what is ahead of it; then all warps place one after the other.
template <typename AnyTeam>
__device__ inline void place_choices(const AnyTeam& team, const PlaceArgs& args, const Places& places) {
  const int num_chunks = ceil_div(team.shape.max_tokens * team.shape.top_k, kChunk), warp = threadIdx.x / 32;
  for (int first = blockIdx.x; first < num_chunks; first += kWarps * gridDim.x) {
    const int mine = first + warp * gridDim.x;
    if (mine < num_chunks) {
      const int before = rows_before_chunk(team, places, mine);
      if (threadIdx.x % 32 == 0) places.before_chunk[warp] = before;
    }
    __syncthreads();
    for (int i = 0; i < kWarps && first + i * int(gridDim.x) < num_chunks; ++i) {
      for (int turn = 0; turn < team.shape.num_ranks; turn += kTurns) {
        place_chunk(team, args, places, first + i * gridDim.x, turn, places.before_chunk[i]);
      }
    }
  }
}

// Padding comes last in the order. What does not fit has no order worth the name.
__device__ inline void place_padding(const Team& team, const PlaceArgs& args, const Places& places) {
  const int num_local = team.shape.num_experts / team.shape.num_ranks, capacity = int(args.route.capacity);
  const bool fits = places.offsets[num_local] <= capacity;
  const int first = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads;
  for (int i = first; i < num_local * args.route.block; i += stride) {
    const int x = i / args.route.block;
    const int row = places.offsets[x] + places.counts[x] + i % args.route.block;
    if (row >= places.offsets[x + 1] || row >= capacity) continue;
    args.route.origin[row] = -1;
    const int padding_before = row - places.rows_before[x + 1];
    if (fits) args.route.order[places.rows_before[num_local] + padding_before] = row;
    if (args.row_weight != nullptr) args.row_weight[row] = 0.0f;
  }
  for (int row = first; !fits && row < capacity; row += stride) args.route.order[row] = row;
}

// Where the rows of this rank's own choices lie, at whatever ranks: their offsets follow from everybody's totals as
// `sum_counts` has it there. shared: [2][E].
__device__ inline void find_places(const Team& team, const PlaceArgs& args, int* shared) {
  const int num_experts = team.shape.num_experts, num_local = num_experts / team.shape.num_ranks;
  int *starts = shared, *padded = shared + num_experts;
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int total = 0, earlier = 0;
    for (int r = 0; r < team.shape.num_ranks; ++r) {
      const int count = __ldcg(in_window<int>(team.peers[r], team.at.totals) + e);
      if (r < team.shape.rank) earlier += count;
      total += count;
    }
    starts[e] = earlier;
    padded[e] = round_up(total, args.route.block);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    for (int before = e / num_local * num_local; before < e; ++before) starts[e] += padded[before];
  }
  __syncthreads();
  const int num_choices = __ldcg(in_window<int>(team.self, team.at.num_tokens)) * team.shape.top_k;
  const int* chunk_starts = in_window<int>(team.self, team.at.chunk_starts);
  for (int entry = blockIdx.x * kThreads + threadIdx.x; entry < num_choices; entry += gridDim.x * kThreads) {
    const uint32_t packed = __ldcg(in_window<uint32_t>(team.self, team.at.choice) + entry);
    const int expert = int(packed >> 16);
    uint32_t place = kNoPlace;
    if (packed != kNoExpert) {
      const int earlier = __ldcg(chunk_starts + int64_t(entry / kChunk) * num_experts + expert);
      place = uint32_t(expert / num_local) << kPlaceBits | uint32_t(starts[expert] + earlier + int(packed & 0xffff));
    }
    args.place[entry] = place;
  }
}

template <typename AnyTeam>
__global__ void __launch_bounds__(kThreads, 1)
    ep_place_kernel(const __grid_constant__ AnyTeam team, const __grid_constant__ PlaceArgs args) {
  extern __shared__ int shared[];
  const Places places = places_in(shared, team.shape);
  const bool fine = await_peers(team, EpPhase::kStage, next_epoch(team, EpPhase::kPull));
  if (fine) sum_counts(team, places, args.route.block);
  if (blockIdx.x == 0) write_layout(team, args, places, fine);
  if (!fine) return;
  place_choices(team, args, places);
  place_padding(team, args, places);
  if constexpr (std::is_same_v<AnyTeam, Team>) {
    if (args.place != nullptr) find_places(team, args, shared);
  }
}

}  // namespace dsv3rt
