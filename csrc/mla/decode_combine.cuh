// Joins the partial results of requests that several blocks attended to. One warp a row.
#pragma once

#include "mla/decode_pieces.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

constexpr int kCombineRows = 8;
constexpr int kCombineThreads = 32 * kCombineRows;

// Rooms of all requests, and of those before this one.
struct Rooms {
  int total = 0, before = 0;
};

__device__ __forceinline__ Rooms sum_rooms(const MlaDecodeParams& params, int request) {
  Rooms own;
  for (int i = threadIdx.x; i < params.num_requests; i += kCombineThreads) {
    const int room = room_of(request_length(params, i));
    own.total += room;
    if (i < request) own.before += room;
  }
  __shared__ Rooms of_warp[kCombineRows];
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

// Partial results of one block of rows and request: that of the first part, then those of the parts that follow it.
struct Partials {
  PartRange parts;
  int64_t block_slot;  // of the block of rows' first part

  __device__ __forceinline__ int64_t slot(int part) const {
    return block_slot + part * kPartialsAPart + (part == parts.first);
  }
};

// The row's logarithm (base 2) of the sum of all weights.
__device__ __forceinline__ float combine_lse(const MlaDecodeParams& params, const Partials& partials, int row) {
  float peak = -INFINITY, sum = 0;
  for (int part = partials.parts.first; part <= partials.parts.last; ++part) {
    peak = fmaxf(peak, params.partial_lse[partials.slot(part) * params.grid.block_rows + row]);
  }
  if (peak == -INFINITY) return peak;
  for (int part = partials.parts.first; part <= partials.parts.last; ++part) {
    sum += exp2f(params.partial_lse[partials.slot(part) * params.grid.block_rows + row] - peak);
  }
  return peak + log2f(sum);
}

__global__ void __launch_bounds__(kCombineThreads)
    mla_decode_combine_kernel(const __grid_constant__ MlaDecodeParams params) {
  constexpr float kLn2 = 0.693147180559945309f;
  constexpr int kOctets = kLatentDim / 8 / 32;  // of a lane
  const int request = blockIdx.y, lane = threadIdx.x % 32;
  const int rows = params.num_queries * params.num_heads, request_row = blockIdx.x * kCombineRows + threadIdx.x / 32;
  const int length = request_length(params, request);
  const Rooms rooms = sum_rooms(params, request);
  const PartRange parts = parts_of(rooms.before, length, share_of(rooms.total, params.grid.parts));
  if (request_row >= rows || (length > 0 && parts.first == parts.last)) return;

  const int64_t block_slot = int64_t(request_row / params.grid.block_rows) * params.grid.parts * kPartialsAPart;
  const Partials partials{parts, block_slot};
  const int row = request_row % params.grid.block_rows;
  const float lse = length == 0 ? -INFINITY : combine_lse(params, partials, row);
  float sums[kOctets][8] = {};
  if (lse != -INFINITY) {
#pragma unroll 2
    for (int part = parts.first; part <= parts.last; ++part) {
      const int64_t partial_row = partials.slot(part) * params.grid.block_rows + row;
      const float weight = exp2f(params.partial_lse[partial_row] - lse);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const float* source = params.partial_out + partial_row * kLatentDim + (octet * 32 + lane) * 8;
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
          const float4 values = reinterpret_cast<const float4*>(source)[quad];
          float* const sum = &sums[octet][quad * 4];
          sum[0] = fmaf(weight, values.x, sum[0]);
          sum[1] = fmaf(weight, values.y, sum[1]);
          sum[2] = fmaf(weight, values.z, sum[2]);
          sum[3] = fmaf(weight, values.w, sum[3]);
        }
      }
    }
  }
  const int64_t out_row = int64_t(request) * rows + request_row;
#pragma unroll
  for (int octet = 0; octet < kOctets; ++octet) {
    store_octet(params.out, out_row * kLatentDim + (octet * 32 + lane) * 8, sums[octet]);
  }
  if (lane == 0) params.lse[out_row] = lse * kLn2;
}

}  // namespace dsv3rt
