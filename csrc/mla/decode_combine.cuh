// Joins the partial results of requests that several blocks attended to. One warp has half the columns of a row.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/fragment.cuh"
#include "mla/decode_pieces.cuh"

namespace dsv3rt {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = 32 * kCombineWarps;
constexpr int kCombineTiles = 2;  // a row's
constexpr int kCombineRows = kCombineWarps / kCombineTiles;
constexpr int kCombineQuads = kLatentDim / kCombineTiles / 4 / 32;  // of a lane: columns that follow each other
constexpr int kCombineBatch = 4;                                    // parts that are loaded at a time

// Rooms of all requests, and of those before this one.
struct Rooms {
  int total = 0, before = 0;
};

__device__ __forceinline__ Rooms sum_rooms(const MlaDecodeParams& params, int request) {
  Rooms own;
  for (int i = threadIdx.x; i < params.num_requests; i += kCombineThreads) {
    const int room = room_of(params, request_length(params, i));
    own.total += room;
    if (i < request) own.before += room;
  }
  __shared__ Rooms of_warp[kCombineWarps];
  own = {sum_over_warp(own.total), sum_over_warp(own.before)};
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  Rooms all;
#pragma unroll
  for (const Rooms& some : of_warp) {
    all.total += some.total;
    all.before += some.before;
  }
  return all;
}

// A row's weighted mean over some of the parts, in the columns of a lane.
struct CombinedRow {
  float peak = -INFINITY;  // largest lse, base 2
  float sum = 0;           // of 2^(lse - peak)
  float columns[kCombineQuads][4] = {};
};

// Takes in a batch of parts, of which the first `count` exist; `row_of` has the row of each one's partial result.
template <class RowOf>
__device__ __forceinline__ void take_parts(CombinedRow& combined, const MlaDecodeParams& params, int column, int count,
                                           RowOf row_of) {
  float lse[kCombineBatch];
  float4 values[kCombineBatch][kCombineQuads];
#pragma unroll
  for (int i = 0; i < kCombineBatch; ++i) {
    const int64_t row = row_of(i);
    lse[i] = i < count ? params.partial_lse[row] : -INFINITY;
#pragma unroll
    for (int quad = 0; quad < kCombineQuads; ++quad) {
      const float* source = params.partial_out + row * kLatentDim + column + quad * 128;
      values[i][quad] = i < count ? *reinterpret_cast<const float4*>(source) : make_float4(0, 0, 0, 0);
    }
  }
  float peak = combined.peak;
#pragma unroll
  for (const float x : lse) peak = fmaxf(peak, x);
  const float offset = peak == -INFINITY ? 0 : peak, rescale = exp2f(combined.peak - offset);
  combined.peak = peak;
  combined.sum *= rescale;
#pragma unroll
  for (auto& of_quad : combined.columns) {
#pragma unroll
    for (float& x : of_quad) x *= rescale;
  }
#pragma unroll
  for (int i = 0; i < kCombineBatch; ++i) {
    const float weight = exp2f(lse[i] - offset);
    combined.sum += weight;
#pragma unroll
    for (int quad = 0; quad < kCombineQuads; ++quad) {
      const float of_part[4] = {values[i][quad].x, values[i][quad].y, values[i][quad].z, values[i][quad].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) combined.columns[quad][j] = fmaf(weight, of_part[j], combined.columns[quad][j]);
    }
  }
}

__global__ void __launch_bounds__(kCombineThreads)
    mla_decode_combine_kernel(const __grid_constant__ MlaDecodeParams params) {
  constexpr float kLn2 = 0.693147180559945309f;
  const int request = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = params.num_queries * params.num_heads;
  const int request_row = blockIdx.x * kCombineRows + warp / kCombineTiles;
  const int column = warp % kCombineTiles * (kLatentDim / kCombineTiles) + lane * 4;
  const int length = request_length(params, request);
  const Rooms rooms = sum_rooms(params, request);
  const PartRange parts =
      parts_of(rooms.before + start_room(params), pages_of(length), share_of(rooms.total, params.grid.parts));
  wait_for_prior_grid();
  if (request_row >= rows || (length > 0 && parts.first == parts.last)) return;

  const int64_t first_part = int64_t(request_row / params.grid.block_rows) * params.grid.parts;
  CombinedRow combined;
  for (int part = parts.first; length > 0 && part <= parts.last; part += kCombineBatch) {
    take_parts(combined, params, column, parts.last - part + 1, [&](int i) {
      const int partial = part + i == parts.first;  // there the request is the last, in the others the first
      return ((first_part + part + i) * kPartialsAPart + partial) * params.grid.block_rows +
             request_row % params.grid.block_rows;
    });
  }
  const float inverse = combined.sum == 0 ? 0 : 1 / combined.sum;
  const int64_t out_row = int64_t(request) * rows + request_row;
#pragma unroll
  for (int quad = 0; quad < kCombineQuads; ++quad) {
    const float (&x)[4] = combined.columns[quad];
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(params.out) + out_row * kLatentDim + column + quad * 128) =
        make_uint2(pack_bf16(x[0] * inverse, x[1] * inverse), pack_bf16(x[2] * inverse, x[3] * inverse));
  }
  if (column == 0) params.lse[out_row] = (combined.peak + log2f(combined.sum)) * kLn2;
}

}  // namespace dsv3rt
