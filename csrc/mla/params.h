// Contract of the latent-attention kernels; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int kNopeDim = 128, kRopeDim = 64, kQueryDim = kNopeDim + kRopeDim, kValueDim = 128;
constexpr int kSlab = 64;  // columns of an operand that lie together in shared memory
constexpr int kBackwardQueries = 64;  // of a tile

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
  int device;
};

// Returns null, or what went wrong.
const char* mla_prefill(const MlaPrefillParams& params, void* stream);

// Gradients of the inputs from those of out and lse. Statistics of queries lie in tiles of 64 queries of one sequence
// and head; sequence b's first tile has the index tile_of(q_ends[b], b).
struct MlaBackwardParams {
  HeadsView q, k_nope, k_rope, v;  // as in the forward pass
  HeadsView out, dout;             // (Tq, H, 128)
  const float* lse;                // (Tq, H), contiguous
  const float* dlse;               // (Tq, H), contiguous
  void* dq;                        // (Tq, H, 192) BF16, contiguous
  void* dk_nope;                   // (Tk, H, 128) BF16, in the strides of dkv_*
  void* dv;                        // (Tk, H, 128) BF16, likewise
  void* dk_rope;                   // (Tk, 64) BF16, contiguous
  int64_t dkv_row_stride, dkv_head_stride;
  const int32_t* q_ends;           // (B + 1,)
  const int32_t* k_ends;           // (B + 1,)
  float* statistics;               // scratch (H, tiles, 2, 64): lse * log2(e); sum(out * dout) - dlse
  float* dk_rope_parts;            // scratch (H, Tk, 64): of each head
  int32_t* tile_counters;          // two numbers of scratch
  int num_queries, num_keys;       // Tq, Tk
  int num_heads, num_sequences;
  int num_tiles;                   // of queries, at least Tq / 64 + B
  float scale;
  bool causal;
  int device;
};

// Returns null, or what went wrong.
const char* mla_prefill_backward(const MlaBackwardParams& params, void* stream);

}  // namespace dsv3rt
