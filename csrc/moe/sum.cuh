// A token's rows into their sum, in FP32 and in the order of k: a warp for each 256 of its columns, 16 bytes a lane and
// load. A warp's loads are all under way together. Rows named by nothing but padding are never read.
#pragma once

#include "common/math.h"
#include "moe/rows.cuh"

namespace dsv3rt {

constexpr int kSumRows = 8;  // under way together
constexpr int kSumSpan = 32;  // octets of columns of a warp
constexpr int kSumWarps = 4;  // of a block
constexpr int kSumBlocks = 8;  // of a multiprocessor: 128 KB under way

// The warps that all tokens take.
struct SumSpans {
  int64_t of_token, all;

  explicit SumSpans(const UnpermuteParams& params)
      : of_token(ceil_div(params.num_columns / 8, kSumSpan)), all(params.num_tokens * of_token) {}
};

// A choice of the token, as its lane has found it; a row that does not exist is null.
struct FoundChoice {
  const uint4* row;
  float weight;
};

template <bool kWeighted>
__device__ __forceinline__ FoundChoice find_choice(const UnpermuteParams& params, int64_t token, int first) {
  const int lane = threadIdx.x % 32;
  if (lane >= kSumRows || first + lane >= params.top_k) return {nullptr, 0.0f};
  const int64_t choice = token * params.top_k + first + lane, row = params.row_of[choice];
  const float weight = kWeighted ? params.weight[choice] : 1.0f;
  if (!is_row(row, params.num_rows)) return {nullptr, 0.0f};
  return {static_cast<const uint4*>(params.rows) + row * (params.num_columns / 8), weight};
}

// Adds the rows that the first lanes have found. Their addresses stay with them: in all lanes they would fill
// registers.
template <bool kWeighted>
__device__ __forceinline__ void add_choices(float (&sums)[8], const FoundChoice& found, int octet, bool exists) {
  uint4 words[kSumRows];
  const unsigned exist = __ballot_sync(~0u, found.row != nullptr);
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
    const auto row = reinterpret_cast<const uint4*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(found.row), i));
    if ((exist >> i & 1) != 0 && exists) words[i] = row[octet];
  }
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
    const float weight = kWeighted ? __shfl_sync(~0u, found.weight, i) : 1.0f;
    if ((exist >> i & 1) == 0) continue;
    float values[8];
    unpack_octet(values, words[i]);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = fmaf(weight, values[j], sums[j]);  // as the reference's addcmul
  }
}

template <bool kWeighted>
__global__ void __launch_bounds__(32 * kSumWarps, kSumBlocks)
    unpermute_kernel(const __grid_constant__ UnpermuteParams params, const __grid_constant__ SumSpans spans) {
  const unsigned span = blockIdx.x * kSumWarps + threadIdx.x / 32, of_token = static_cast<unsigned>(spans.of_token);
  if (span >= spans.all) return;
  const int64_t token = span / of_token;
  const int num_octets = params.num_columns / 8, octet = span % of_token * kSumSpan + threadIdx.x % 32;
  const bool exists = octet < num_octets;
  float sums[8] = {};
  for (int first = 0; first < params.top_k; first += kSumRows) {
    add_choices<kWeighted>(sums, find_choice<kWeighted>(params, token, first), octet, exists);
  }
  if (exists) static_cast<uint4*>(params.y)[token * num_octets + octet] = pack_bf16(sums);
}

}  // namespace dsv3rt
