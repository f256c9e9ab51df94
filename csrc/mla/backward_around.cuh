// What runs before and behind the backward kernel: statistics of queries, and sums in FP32 to gradients in BF16.
#pragma once

#include "mla/backward_storage.cuh"
#include "mla/store_rows.cuh"

namespace dsv3rt {

// Queries of one tile: row of the first, and how many there are; none behind the last sequence and between two.
struct QueryTile {
  int first, count;
};

__device__ __forceinline__ QueryTile find_query_tile(const MlaBackwardParams& params, int tile) {
  int low = 0, high = params.num_sequences;  // tile_of(low) <= tile < tile_of(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (tile_of(params.q_ends[middle], middle) <= tile ? low : high) = middle;
  }
  const int offset = (tile - tile_of(params.q_ends[low], low)) * kBackwardQueries;
  const int count = min(max(length_of(params.q_ends, low) - offset, 0), kBackwardQueries);
  return {params.q_ends[low] + offset, count};
}

// One block a tile and head: delta = sum(out * dout) - dlse, lse in base 2, and zeros where dq will be summed. Queries
// that see no key, and those that are missing from a tile, get an lse of infinity: their weights come out as zero.
__global__ void __launch_bounds__(256) mla_backward_prepare_kernel(const __grid_constant__ MlaBackwardParams params) {
  constexpr float kLog2E = 1.44269504088896341f;
  const int head = blockIdx.y, lane = threadIdx.x % 16;
  const QueryTile tile = find_query_tile(params, blockIdx.x);
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
  auto* sums = reinterpret_cast<float4*>(params.dq_sum + index * kQuerySumFloats);
  for (int i = threadIdx.x; i < kQuerySumFloats / 4; i += 256) sums[i] = make_float4(0, 0, 0, 0);
}

// One block a tile and head, thread by thread what the backward kernel's threads summed.
__global__ void __launch_bounds__(256) mla_backward_finish_kernel(const __grid_constant__ MlaBackwardParams params) {
  const int head = blockIdx.y, warpgroup = threadIdx.x / 128;
  const QueryTile tile = find_query_tile(params, blockIdx.x);
  if (tile.count == 0) return;
  const int64_t index = int64_t(head) * params.num_tiles + blockIdx.x;
  const float* source = params.dq_sum + index * kQuerySumFloats + query_sum_offset();
  QueryGradient dq;
#pragma unroll
  for (int i = 0; i < (kNopeDim + kRopeDim) / 4; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(source + i / 4 * kQuerySumStride);
    float* target = i < kNopeDim / 4 ? &dq.nope[i] : &dq.rope[i - kNopeDim / 4];
    target[0] = four.x, target[1] = four.y, target[2] = four.z, target[3] = four.w;
  }
  const int64_t row_stride = int64_t(params.num_heads) * kQueryDim;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  auto* target = static_cast<__nv_bfloat16*>(params.dq) + tile.first * row_stride + head * kQueryDim;
  store_rows<kNopeDim / 16>(target + warpgroup * (kNopeDim / 2), row_stride, row, tile.count, dq.nope, 0, params.scale);
  store_rows<kRopeDim / 16>(target + kNopeDim + warpgroup * (kRopeDim / 2), row_stride, row, tile.count, dq.rope, 0,
                            params.scale);
}

// dk_rope, eight numbers a thread.
__global__ void __launch_bounds__(256) mla_backward_rope_kernel(const __grid_constant__ MlaBackwardParams params) {
  const int64_t first = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 8;
  if (first >= int64_t(params.num_keys) * kRopeDim) return;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* pair = params.dk_rope_sum + first + i * 2;
    words[i] = pack_bf16(pair[0] * params.scale, pair[1] * params.scale);
  }
  *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(params.dk_rope) + first) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace dsv3rt
