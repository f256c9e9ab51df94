// Contract of the latent-attention kernels; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int kNopeDim = 128, kRopeDim = 64, kQueryDim = kNopeDim + kRopeDim, kValueDim = 128;

// A (rows, heads, columns) BF16 array with contiguous columns, 16-byte aligned; strides in elements, multiples of 8.
struct HeadsView {
  const void* data;
  int64_t row_stride, head_stride;
};

// out = softmax(scale * (q_nope k_nope^T + q_rope k_rope^T)) v inside each sequence
struct MlaPrefillParams {
  HeadsView q;       // (Tq, H, 192): nope, then rope
  HeadsView k_nope;  // (Tk, H, 128)
  HeadsView k_rope;  // (Tk, 1, 64): one for all heads
  HeadsView v;       // (Tk, H, 128)
  void* out;         // (Tq, H, 128) BF16, contiguous
  float* lse;        // (Tq, H), contiguous
  const int32_t* q_ends;  // (B + 1,) on the device, rising from 0 to Tq
  const int32_t* k_ends;  // (B + 1,), rising from 0 to Tk
  int32_t* tile_counter;  // one number of scratch
  int num_queries, num_keys;  // Tq, Tk
  int num_heads, num_sequences;
  float scale;       // positive
  bool causal;       // the last query of a sequence sees its last key
  bool ping_pong;    // warpgroups take turns at issuing products
  int device;
};

// Returns null, or what went wrong.
const char* mla_prefill(const MlaPrefillParams& params, void* stream);

}  // namespace dsv3rt
