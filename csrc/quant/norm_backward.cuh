// The backward pass of RMSNorm. A group of threads, two octets of a row each, walks over rows; the next row arrives in
// shared memory while it computes. Sums for the weight stay in registers until the end.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/memory.cuh"
#include "quant/norm.cuh"

namespace dsv3rt {

constexpr int kMaxNormGroups = 32;
constexpr int kNormOctets = 2;  // of a row, a thread
constexpr int kNormStages = 2;
constexpr int kNormGroupBarrier = 1;  // the first; groups of more than a warp have one each

// How a block is cut into groups of whole warps, one row each at a time.
struct NormGroups {
  int threads;  // of a group
  int count;

  DSV3RT_HOST_DEVICE int block_threads() const { return threads * count; }
  // Every thread copies what it will read itself: x, gradient and, if there is one, the residual stream's gradient.
  DSV3RT_HOST_DEVICE int shared_bytes(bool with_residual) const {
    return block_threads() * kNormStages * kNormOctets * (with_residual ? 3 : 2) * 16;
  }
};

// Where a thread of a group finds its octets of rows in global and in shared memory.
class NormCursor {
 public:
  __device__ __forceinline__ NormCursor(const NormBackwardParams& params, const NormGroups& groups, uint4* slots)
      : params_(params),
        slots_(slots + threadIdx.x),
        thread_(threadIdx.x % groups.threads),
        threads_(groups.threads),
        block_threads_(groups.block_threads()) {}

  __device__ __forceinline__ int index(int i) const { return i * threads_ + thread_; }
  __device__ __forceinline__ bool has(int i) const { return index(i) * 8 < params_.num_columns; }

  // One group of copies; an empty one where the row does not exist.
  __device__ __forceinline__ void copy_row(int64_t row, int stage) const {
    if (row < params_.num_rows) {
#pragma unroll
      for (int i = 0; i < kNormOctets; ++i) {
        if (!has(i)) continue;
        copy(0, i, stage, params_.x, row * params_.x_stride);
        copy(1, i, stage, params_.grad, row * params_.grad_stride);
        if (params_.grad_residual != nullptr) {
          copy(2, i, stage, params_.grad_residual, row * params_.grad_residual_stride);
        }
      }
    }
    copy_async_commit();
  }

  __device__ __forceinline__ Octet<__nv_bfloat16> octet(int tensor, int i, int stage) const {
    return {*slot(tensor, i, stage)};
  }

  // Read again each time, out of the L1: registers are short.
  template <typename Weight>
  __device__ __forceinline__ Octet<Weight> weight(int i) const {
    Octet<Weight> octet;
    octet.load(static_cast<const Weight*>(params_.weight) + index(i) * 8);
    return octet;
  }

  __device__ __forceinline__ void write(int64_t row, int i, const Octet<__nv_bfloat16>& octet) const {
    static_cast<uint4*>(params_.dx)[row * (params_.num_columns / 8) + index(i)] = octet.words;
  }

 private:
  __device__ __forceinline__ uint4* slot(int tensor, int i, int stage) const {
    return slots_ + ((tensor * kNormStages + stage) * kNormOctets + i) * block_threads_;
  }
  __device__ __forceinline__ void copy(int tensor, int i, int stage, const void* base, int64_t offset) const {
    copy_async<16>(slot(tensor, i, stage), static_cast<const __nv_bfloat16*>(base) + offset + index(i) * 8, true);
  }

  const NormBackwardParams& params_;
  uint4* slots_;
  int thread_, threads_, block_threads_;
};

// Over the warps of a group. Calls alternate between two rows of `warp_sums`: one barrier lies between two uses of one.
__device__ __forceinline__ float sum_over_group(float part, const NormGroups& groups, int group, float* warp_sums) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) part += __shfl_xor_sync(~0u, part, distance);
  if (groups.threads == 32) return part;
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = part;
  GroupBarrier(kNormGroupBarrier + group, groups.threads).sync();
  const int warps = groups.threads / 32;
  float sum = 0.0f;
  for (int warp = 0; warp < warps; ++warp) sum += warp_sums[group * warps + warp];
  return sum;
}

// dx = (g - n * mean(g * n)) * rstd + residual, with g = dy * w and n = x * rstd
__device__ __forceinline__ float norm_gradient(float grad, float normed, float mean, float rstd, float residual) {
  return __fadd_rn(__fmul_rn(__fsub_rn(grad, __fmul_rn(normed, mean)), rstd), residual);
}

// Sums of the groups of a block, in their order, to the block's row of parts.
__device__ __forceinline__ void write_weight_sums(const NormBackwardParams& params, const NormGroups& groups,
                                                  const float (&sums)[kNormOctets][8], float* shared) {
  __syncthreads();  // the slots that are written over have been read
  const int group = threadIdx.x / groups.threads, thread = threadIdx.x % groups.threads;
  const int columns = groups.threads * kNormOctets * 8;
#pragma unroll
  for (int i = 0; i < kNormOctets; ++i) {
    auto* target = reinterpret_cast<float4*>(shared + group * columns + (i * groups.threads + thread) * 8);
    target[0] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    target[1] = make_float4(sums[i][4], sums[i][5], sums[i][6], sums[i][7]);
  }
  __syncthreads();
  float* parts = params.weight_parts + int64_t(blockIdx.x) * params.num_columns;
  for (int column = threadIdx.x; column < params.num_columns; column += blockDim.x) {
    float sum = shared[column];
    for (int g = 1; g < groups.count; ++g) sum += shared[g * columns + column];
    parts[column] = sum;
  }
}

constexpr int kPartGroups = 16;        // of threads that share the parts of a column
constexpr int kPartColumnThreads = 16;  // that take four columns each
constexpr int kPartColumns = 4 * kPartColumnThreads;

// The weight's gradient: parts of the blocks, each group's in their order, then the groups in theirs.
__global__ void __launch_bounds__(kPartGroups* kPartColumnThreads)
    add_weight_parts_kernel(const __grid_constant__ NormBackwardParams params) {
  __shared__ float4 sums[kPartGroups][kPartColumnThreads];
  wait_for_prior_grid();
  const int thread = threadIdx.x % kPartColumnThreads, group = threadIdx.x / kPartColumnThreads;
  const int column = blockIdx.x * kPartColumns + thread * 4;
  const bool exists = column < params.num_columns;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const auto add = [&sum](const float4& part) { sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w; };
  if (exists) {
#pragma unroll 9
    for (int part = group; part < params.num_parts; part += kPartGroups) {
      add(*reinterpret_cast<const float4*>(params.weight_parts + int64_t(part) * params.num_columns + column));
    }
  }
  sums[group][thread] = sum;
  __syncthreads();
  if (group > 0 || !exists) return;
#pragma unroll
  for (int other = 1; other < kPartGroups; ++other) add(sums[other][thread]);
  *reinterpret_cast<float4*>(params.weight_grad + column) = sum;
}

template <typename Weight>
__global__ void __launch_bounds__(1024) norm_backward_kernel(const NormBackwardParams params, const NormGroups groups) {
  let_next_grid_start();
  if (groups.threads > 32) GroupBarrier::init(kNormGroupBarrier, groups.count, groups.threads);
  extern __shared__ uint4 norm_slots[];
  __shared__ float warp_sums[2][kMaxNormGroups];
  const NormCursor cursor(params, groups, norm_slots);
  const int group = threadIdx.x / groups.threads;
  const int64_t step = int64_t(gridDim.x) * groups.count;
  int64_t row = int64_t(blockIdx.x) * groups.count + group;

  float sums[kNormOctets][8] = {};
  cursor.copy_row(row, 0);
#pragma unroll 1
  for (int stage = 0; row < params.num_rows; row += step, stage ^= 1) {
    cursor.copy_row(row + step, stage ^ 1);
    const float rstd = params.rstd[row];
    copy_async_wait<1>();
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormOctets; ++i) {
      if (!cursor.has(i)) continue;
      const Octet<__nv_bfloat16> x = cursor.octet(0, i, stage), dy = cursor.octet(1, i, stage);
      const Octet<Weight> weight = cursor.weight<Weight>(i);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float normed = __fmul_rn(x.get(k), rstd);
        dot = __fmaf_rn(__fmul_rn(dy.get(k), weight.get(k)), normed, dot);
        sums[i][k] = __fmaf_rn(dy.get(k), normed, sums[i][k]);
      }
    }
    const float mean =
        __fdiv_rn(sum_over_group(dot, groups, group, warp_sums[stage]), static_cast<float>(params.num_columns));
#pragma unroll
    for (int i = 0; i < kNormOctets; ++i) {
      if (!cursor.has(i)) continue;
      const Octet<__nv_bfloat16> x = cursor.octet(0, i, stage), dy = cursor.octet(1, i, stage);
      const Octet<Weight> weight = cursor.weight<Weight>(i);
      Octet<__nv_bfloat16> residual;
      residual.clear();
      if (params.grad_residual != nullptr) residual = cursor.octet(2, i, stage);
      float dx[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        dx[k] =
            norm_gradient(__fmul_rn(dy.get(k), weight.get(k)), __fmul_rn(x.get(k), rstd), mean, rstd, residual.get(k));
      }
      cursor.write(row, i, round_octet(dx));
    }
  }
  copy_async_wait<0>();
  write_weight_sums(params, groups, sums, reinterpret_cast<float*>(norm_slots));
}

}  // namespace dsv3rt
