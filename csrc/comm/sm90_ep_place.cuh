// The second step of a dispatch: `place` finds the row of every choice of every rank that this rank's experts serve.
//
// Rows of an expert lie in the order (rank, token, k). A row's number is a sum of counts: offset of the expert, choices
// of earlier ranks, of earlier chunks of its rank, of earlier entries of its chunk. No step depends on who came first.
//
// Rows travel in another order: by the numbers of their tokens, 32 choices of each rank in turn. So all ranks are at
// about the same tokens at about the same time, and what several read, or write, is in the L2.
#pragma once

#include "comm/team.cuh"

namespace dsv3rt {

struct PlaceArgs {
  EpRoute route;
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
  int* before_chunk;  // [1]
};

inline int place_shared_ints(const EpShape& shape) {
  const int num_local = shape.num_experts / shape.num_ranks;
  return shape.num_experts + 3 * num_local + 2 + shape.num_ranks + kWarps * kTurns + 1;
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

// Choices of all ranks in earlier chunks, for this rank's experts; by the whole block.
template <typename AnyTeam>
__device__ inline int rows_before_chunk(const AnyTeam& team, const Places& places, int chunk) {
  const int num_ranks = team.shape.num_ranks, num_local = team.shape.num_experts / num_ranks;
  if (threadIdx.x == 0) *places.before_chunk = 0;
  __syncthreads();
  int before = 0;
  for (int i = threadIdx.x; i < num_ranks * num_local; i += kThreads) {
    const int r = i / num_local;
    char* window = staged_by(team, r);
    const int* counts = in_window<int>(window, team.at.totals);
    if (chunk * kChunk < places.num_choices[r]) {
      counts = in_window<int>(window, team.at.chunk_starts) + int64_t(chunk) * team.shape.num_experts;
    }
    before += __ldcg(counts + team.shape.rank * num_local + i % num_local);
  }
  if (before != 0) atomicAdd(places.before_chunk, before);
  __syncthreads();
  return *places.before_chunk;
}

// Numbers of rows in each warp's choices become numbers of all rows before them, in the order of (warp, turn). By one
// warp; returns the number of all.
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
// not all turn to one of them at a time. `before`: rows ahead of these in the order.
template <typename AnyTeam>
__device__ inline int place_chunk(const AnyTeam& team, const PlaceArgs& args, const Places& places, int chunk, int turn,
                                  int before) {
  const int num_ranks = team.shape.num_ranks, num_experts = team.shape.num_experts;
  const int num_local = num_experts / num_ranks, first = team.shape.rank * num_local;
  const int entry = chunk * kChunk + threadIdx.x, warp = threadIdx.x / 32;
  const unsigned lanes_before = (1u << threadIdx.x % 32) - 1;
  int row[kTurns], place[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int r = (team.shape.rank + turn + i) % num_ranks;
    uint32_t packed = kNoExpert;
    if (turn + i < num_ranks && entry < places.num_choices[r]) {
      packed = __ldcg(in_window<uint32_t>(staged_by(team, r), team.at.choice) + entry);
    }
    const int x = int(packed >> 16) - first;
    const bool here = packed != kNoExpert && x >= 0 && x < num_local;
    row[i] = here ? places.offsets[x] + places.starts[r * num_local + x] + int(packed & 0xffff) : -1;
    if (here) {
      const int* chunk_starts = in_window<int>(staged_by(team, r), team.at.chunk_starts);
      row[i] += __ldcg(chunk_starts + int64_t(chunk) * num_experts + first + x);
    }
    const unsigned all = __ballot_sync(0xffffffffu, here);
    place[i] = __popc(all & lanes_before);
    if (threadIdx.x % 32 == 0) places.in_turn[warp * kTurns + i] = __popc(all);
  }
  __syncthreads();
  if (warp == 0) {
    const int end = start_turns(places.in_turn);
    if (threadIdx.x == 31) *places.before_chunk = before + end;
  }
  __syncthreads();
  const int max_choices = team.shape.max_tokens * team.shape.top_k, capacity = int(args.route.capacity);
  const bool fits = places.offsets[num_local] <= capacity;
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (row[i] < 0 || row[i] >= capacity) continue;
    args.route.origin[row[i]] = (team.shape.rank + turn + i) % num_ranks * max_choices + entry;
    if (fits) args.route.order[before + places.in_turn[warp * kTurns + i] + place[i]] = row[i];
  }
  const int end = *places.before_chunk;
  __syncthreads();  // in_turn is written next
  return end;
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
  }
  for (int row = first; !fits && row < capacity; row += stride) args.route.order[row] = row;
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
  const int num_chunks = ceil_div(team.shape.max_tokens * team.shape.top_k, kChunk);
  for (int chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
    int before = rows_before_chunk(team, places, chunk);
    __syncthreads();  // before_chunk is written next
    for (int turn = 0; turn < team.shape.num_ranks; turn += kTurns) {
      before = place_chunk(team, args, places, chunk, turn, before);
    }
  }
  place_padding(team, args, places);
}

}  // namespace dsv3rt
