// Sums of a token's rows in the order of k, in FP32, by a warp or by a warp's part of the columns. Who sums says where
// the rows lie and what they weigh.
#pragma once

#include <cuda_bf16.h>

#include "comm/team.cuh"
#include "common/bf16_pack.cuh"

namespace dsv3rt {

constexpr int kSumRows = 8;  // under way together
constexpr int kSumColumns = 2;
constexpr int kSumSpan = 32 * kSumColumns;  // octets of columns that a warp sums at a time

// A row of a token, as its lane has found it; null where there is none.
struct FoundRow {
  const uint4* row;
  float weight;
};

// Fused, as the reference's addcmul is.
__device__ __forceinline__ void add_row(float (&sum)[8], uint4 row, float weight) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&row);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    sum[2 * i] = fmaf(pair.x, weight, sum[2 * i]);
    sum[2 * i + 1] = fmaf(pair.y, weight, sum[2 * i + 1]);
  }
}

// Adds the rows that the first lanes have found. Their addresses stay with them: in all lanes they would fill
// registers.
template <bool kWeighted>
__device__ __forceinline__ void add_rows(float (&sums)[kSumColumns][8], const FoundRow& found, int column,
                                         int num_vectors) {
  uint4 held[kSumColumns][kSumRows];
  unsigned exist = 0;
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
    const auto row = reinterpret_cast<const uint4*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(found.row), i));
    if (row == nullptr) continue;
    exist |= 1u << i;
#pragma unroll
    for (int c = 0; c < kSumColumns; ++c) {
      if (column + 32 * c < num_vectors) held[c][i] = load_shared_memory(row + column + 32 * c);
    }
  }
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
    const float weight = kWeighted ? __shfl_sync(~0u, found.weight, i) : 1.0f;
    if ((exist >> i & 1) == 0) continue;
#pragma unroll
    for (int c = 0; c < kSumColumns; ++c) add_row(sums[c], held[c][i], weight);
  }
}

// `find(first)`: what this lane finds of the kSumRows rows from `first` on. Octets of columns from `start` to `end`.
template <bool kWeighted, typename Find>
__device__ __forceinline__ void sum_token(const Team& team, __nv_bfloat16* tokens, int token, int start, int end,
                                          Find find) {
  const int num_vectors = team.shape.num_columns / 8, top_k = team.shape.top_k;
  const FoundRow first_rows = find(0);
  auto* target = reinterpret_cast<uint4*>(tokens) + int64_t(token) * num_vectors;
  for (int span = start; span < end; span += kSumSpan) {
    const int column = span + threadIdx.x % 32;
    float sums[kSumColumns][8] = {};
    add_rows<kWeighted>(sums, first_rows, column, num_vectors);
    for (int first = kSumRows; first < top_k; first += kSumRows) {
      add_rows<kWeighted>(sums, find(first), column, num_vectors);
    }
#pragma unroll
    for (int c = 0; c < kSumColumns; ++c) {
      if (column + 32 * c < num_vectors) target[column + 32 * c] = pack_bf16(sums[c]);
    }
  }
}

// NaN, where an error was reported; nobody may take what is there for a result.
__device__ inline void spoil_token(const Team& team, __nv_bfloat16* tokens, int token, int start, int end) {
  auto* target = reinterpret_cast<uint4*>(tokens) + int64_t(token) * (team.shape.num_columns / 8);
  for (int i = start + threadIdx.x % 32; i < min(end, team.shape.num_columns / 8); i += 32) {
    target[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
}

}  // namespace dsv3rt
