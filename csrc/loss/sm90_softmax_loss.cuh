// softmax_loss: a row of FP32 logits is read once. A cluster of eight blocks holds it in registers from the maximum to
// the gradients.
#pragma once

#include <cooperative_groups.h>

#include "common/math.h"
#include "common/octet.cuh"
#include "hopper/arithmetic.cuh"
#include "loss/params.h"

namespace dsv3rt {

constexpr int kLossThreads = 512;
constexpr int kLossWarps = kLossThreads / 32;
constexpr int kRowBlocks = 8;  // blocks of a cluster, which share a row
constexpr float kMinusInfinity = -__builtin_huge_valf();

// e^(x - reference) for x up to the reference: 2 ulp, and half an ulp of the argument.
__device__ __forceinline__ float exp_below(float x, float reference) {
  constexpr float kLog2E = 1.4426950408889634f;
  return exp2_approx((x - reference) * kLog2E);
}

// A sum of e^(x - max) over part of a row. The maximum of nothing is -infinity, and its sum is 0.
struct PartialSum {
  float max, sum;

  // What the sum is worth beside a maximum of all.
  __device__ __forceinline__ float scale_to(float whole_max) const {
    return max == kMinusInfinity ? 0.0f : exp_below(max, whole_max);
  }
};

__device__ __forceinline__ PartialSum sum_over_warp(PartialSum part) {
  float max = part.max;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, distance));
  float sum = part.sum * part.scale_to(max);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return {max, sum};
}

// The octets of a row that a block holds: its thread t has first + t, first + t + kLossThreads, ...
struct RowPart {
  int first, last;

  __device__ __forceinline__ RowPart(int vocab, int rank) {
    const int octets = ceil_div(vocab, kOctet), octets_a_block = ceil_div(octets, kRowBlocks);
    first = rank * octets_a_block;
    last = min(first + octets_a_block, octets);
  }
  __device__ __forceinline__ int octet(int i) const { return first + threadIdx.x + i * kLossThreads; }
};

__device__ __forceinline__ void load_logits(const float* row, int column, int vocab, float (&x)[kOctet]) {
  if (column + kOctet <= vocab) {
    load_octet(row + column, x);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) x[j] = column + j < vocab ? row[column + j] : kMinusInfinity;
  }
}

__device__ __forceinline__ void store_gradients(__nv_bfloat16* row, int column, int vocab, const float (&x)[kOctet]) {
  if (column + kOctet <= vocab) {
    store_octet(row + column, x);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (column + j < vocab) store_one(row + column + j, x[j]);
    }
  }
}

template <int kOctets>
__device__ __forceinline__ void ignore_row(const SoftmaxLossParams& params, const RowPart& part, bool writes_loss,
                                           int64_t row, __nv_bfloat16* dlogits) {
  if (writes_loss) params.loss[row] = 0.0f;
  if (dlogits == nullptr) return;
  const float zeros[kOctet] = {};
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (part.octet(i) < part.last) store_gradients(dlogits, part.octet(i) * kOctet, params.vocab, zeros);
  }
}

// This thread's part of the sum; its logits become e^(x - max of this thread).
template <int kOctets>
__device__ __forceinline__ PartialSum exponentiate(float (&x)[kOctets][kOctet]) {
  float max = kMinusInfinity;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) max = fmaxf(max, x[i][j]);
  }
  const float reference = max == kMinusInfinity ? 0.0f : max;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      x[i][j] = exp_below(x[i][j], reference);
      sum += x[i][j];
    }
  }
  return {max, sum};
}

// Every warp leaves its part with all blocks of the cluster; each thread then has the sum over the row, added up in the
// same order everywhere.
__device__ __forceinline__ PartialSum sum_over_cluster(PartialSum part, int rank,
                                                       PartialSum (&parts)[kRowBlocks * kLossWarps]) {
  namespace cg = cooperative_groups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  part = sum_over_warp(part);
  const cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();  // all blocks have begun: their shared memory is there
  if (lane < kRowBlocks) *cluster.map_shared_rank(&parts[rank * kLossWarps + warp], lane) = part;
  cluster.sync();
  static_assert(kRowBlocks * kLossWarps == 4 * 32, "four parts a lane");
  PartialSum mine[4];
  float max = kMinusInfinity, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    mine[i] = parts[i * 32 + lane];
    max = fmaxf(max, mine[i].max);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += mine[i].sum * mine[i].scale_to(max);
  return sum_over_warp({max, sum});
}

template <int kOctets>
__global__ void __cluster_dims__(kRowBlocks, 1, 1) __launch_bounds__(kLossThreads, kOctets > 4   ? 1
                                                                                   : kOctets > 1 ? 2
                                                                                                 : 3)
    softmax_loss_kernel(const SoftmaxLossParams params) {
  __shared__ PartialSum parts[kRowBlocks * kLossWarps];
  const int64_t row = blockIdx.x / kRowBlocks;
  const int rank = blockIdx.x % kRowBlocks;
  const RowPart part(params.vocab, rank);
  const int64_t label = params.labels[row];
  auto* dlogits =
      params.dlogits == nullptr ? nullptr : static_cast<__nv_bfloat16*>(params.dlogits) + row * params.dlogits_stride;
  const bool is_first_thread = rank == 0 && threadIdx.x == 0;
  if (label == params.ignore_index) {  // for all blocks of the cluster alike
    ignore_row<kOctets>(params, part, is_first_thread, row, dlogits);
    return;
  }
  if (is_first_thread && (label < 0 || label >= params.vocab)) params.loss[row] = __int_as_float(0x7fffffff);

  const float* logits = params.logits + row * params.logits_stride;
  float x[kOctets][kOctet];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    if (part.octet(i) < part.last) {
      load_logits(logits, part.octet(i) * kOctet, params.vocab, x[i]);
    } else {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) x[i][j] = kMinusInfinity;
    }
  }
  float label_logit = 0.0f;
  bool has_label = false;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int64_t place = label - int64_t(part.octet(i)) * kOctet;
    if (part.octet(i) < part.last && place >= 0 && place < kOctet && label < params.vocab) {
      has_label = true;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) label_logit = place == j ? x[i][j] : label_logit;
    }
  }

  const PartialSum mine = exponentiate(x);
  const PartialSum whole = sum_over_cluster(mine, rank, parts);
  const float log_sum = logf(whole.sum), lse = whole.max + log_sum;
  // The logarithm is added last: the difference is exact where the label is the likeliest.
  if (has_label) params.loss[row] = (whole.max - label_logit) + log_sum + params.z_loss * lse * lse;
  if (dlogits == nullptr) return;

  const float factor = *params.factor;
  const float weight = mine.scale_to(whole.max) / whole.sum * (factor * (1.0f + 2.0f * params.z_loss * lse));
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const int octet = part.octet(i);
    const int64_t place = label - int64_t(octet) * kOctet;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) x[i][j] = x[i][j] * weight - (place == j ? factor : 0.0f);
    if (octet < part.last) store_gradients(dlogits, octet * kOctet, params.vocab, x[i]);
  }
}

}  // namespace dsv3rt
