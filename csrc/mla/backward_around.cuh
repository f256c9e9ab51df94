// What runs before and behind the products of the backward pass: statistics of queries, and the sum of dk_rope over
// heads.
#pragma once

#include "hopper/fragment.cuh"
#include "mla/backward_storage.cuh"

namespace dsv3rt {

// Queries of one tile: row of the first, and how many there are; none behind the last sequence and between two.
struct QueryRows {
  int first, count;
};

__device__ __forceinline__ QueryRows find_query_rows(const MlaBackwardParams& params, int tile) {
  int low = 0, high = params.num_sequences;  // tile_of(low) <= tile < tile_of(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (tile_of(params.q_ends[middle], middle) <= tile ? low : high) = middle;
  }
  const int offset = (tile - tile_of(params.q_ends[low], low)) * kBackwardQueries;
  const int count = min(max(length_of(params.q_ends, low) - offset, 0), kBackwardQueries);
  return {params.q_ends[low] + offset, count};
}

// One block a tile and head: delta = sum(out * dout) - dlse, and lse in base 2. Queries that see no key, and those that
// are missing from a tile, get an lse of infinity: their weights come out as zero.
__global__ void __launch_bounds__(256) mla_backward_prepare_kernel(const __grid_constant__ MlaBackwardParams params) {
  constexpr float kLog2E = 1.44269504088896341f;
  const int head = blockIdx.y, lane = threadIdx.x % 16;
  const QueryRows tile = find_query_rows(params, blockIdx.x);
  const int64_t index = int64_t(head) * params.num_tiles + blockIdx.x;
  auto& statistics = reinterpret_cast<QueryStatistics*>(params.statistics)[index];
#pragma unroll
  for (int row = threadIdx.x / 16; row < kBackwardQueries; row += 16) {
    float sum = 0;
    if (row < tile.count) {
      const auto eight = [&](const HeadsView& view) {
        const auto* data = static_cast<const __nv_bfloat16*>(view.data) + (tile.first + row) * view.row_stride;
        return *reinterpret_cast<const uint4*>(data + head * view.head_stride + lane * 8);
      };
      const uint4 out = eight(params.out), dout = eight(params.dout);
      const auto* x = reinterpret_cast<const __nv_bfloat162*>(&out);
      const auto* y = reinterpret_cast<const __nv_bfloat162*>(&dout);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = __bfloat1622float2(x[i]), b = __bfloat1622float2(y[i]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
      }
    }
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) {
      const int64_t place = int64_t(tile.first + row) * params.num_heads + head;
      const float lse = row < tile.count ? params.lse[place] : -INFINITY;
      const bool blind = lse == -INFINITY;
      statistics.lse_log2[row] = blind ? INFINITY : lse * kLog2E;
      statistics.delta[row] = blind ? 0 : sum - params.dlse[place];
    }
  }
}

// dk_rope: the sum over heads, one after another, so that it comes out the same every time. Four columns a thread.
__global__ void __launch_bounds__(256) mla_backward_rope_kernel(const __grid_constant__ MlaBackwardParams params) {
  const int64_t numbers = int64_t(params.num_keys) * kRopeDim;
  const int64_t first = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (first >= numbers) return;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int head = 0; head < params.num_heads; ++head) {
    const float4 part = *reinterpret_cast<const float4*>(params.dk_rope_parts + head * numbers + first);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(params.dk_rope) + first) = make_uint2(
      pack_bf16(sum.x * params.scale, sum.y * params.scale), pack_bf16(sum.z * params.scale, sum.w * params.scale));
}

}  // namespace dsv3rt
