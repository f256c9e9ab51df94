// Contracts of the kernels for positions and embeddings; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

// (T, H, R) BF16: strides in elements, multiples of 8; columns contiguous, 16-byte aligned.
struct HeadRows {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

struct RopeParams {
  HeadRows x, y;      // may be the same memory
  const float* cos;   // (T, R / 2), contiguous, 16-byte aligned
  const float* sin;
  int64_t num_tokens;
  int num_heads;
  int num_columns;    // R, a multiple of 8
  bool inverse;       // turn by (cos, -sin)
  int device;
};

struct EmbeddingBackwardParams {
  const void* grad;        // (T, D) BF16, rows grad_stride elements apart, 16-byte aligned
  const int64_t* order;    // (T,): positions in the order of their tokens, those of one token in their own order
  const int32_t* tokens;   // (T,): in that order
  const int32_t* offsets;  // (V + 1,): where each token's positions begin in `order`
  void* weight_grad;       // (V, D) BF16, contiguous
  int64_t grad_stride;
  int64_t num_tokens;      // T, under 2^31
  int64_t num_rows;        // V
  int num_columns;         // D, a multiple of 8
  int device;
};

// Each returns null, or what went wrong.
const char* rope(const RopeParams& params, void* stream);
const char* embedding_backward(const EmbeddingBackwardParams& params, void* stream);

}  // namespace dsv3rt
