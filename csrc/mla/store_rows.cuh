// From accumulators to rows of BF16 in memory: lanes of a quad trade words, so that each stores 16 bytes and a quad 64.
#pragma once

#include <cuda_bf16.h>

#include "hopper/fragment.cuh"

namespace dsv3rt {

// Octets of columns first_octet .. + kOctets go to columns 0 .. 8 * kOctets of `target`; this thread's rows are `row`
// and `row + 8`, of which those before `end_row` are stored.
template <int kOctets, int kFragment>
__device__ __forceinline__ void store_rows(__nv_bfloat16* target, int64_t row_stride, int row, int end_row,
                                           const float (&sums)[kFragment], int first_octet, float factor) {
  static_assert(kOctets % 4 == 0);
  target += row * row_stride + threadIdx.x % 4 * 8;
#pragma unroll
  for (int octet = 0; octet < kOctets; octet += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &sums[(first_octet + octet + i) * 4 + half * 2];
        words[i] = pack_bf16(pair[0] * factor, pair[1] * factor);
      }
      transpose_quad(words);
      if (row + half * 8 < end_row) {
        *reinterpret_cast<uint4*>(target + half * 8 * row_stride + octet * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace dsv3rt
