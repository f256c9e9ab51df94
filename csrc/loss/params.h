// Contract of the loss kernel; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int64_t kMaxVocab = 262144;  // what the registers of a cluster hold

struct SoftmaxLossParams {
  const float* logits;     // (T, V), rows logits_stride elements apart, each aligned to 16 bytes
  const int64_t* labels;   // (T,)
  const float* factor;     // one number: multiplies the gradients
  float* loss;  // (T,): logsumexp - logit of the label + z_loss * logsumexp^2; 0 where ignored, NaN where the
                // label is outside the vocabulary
  void* dlogits;  // (T, V) BF16, rows dlogits_stride elements apart, each aligned to 16 bytes; null: none
  int64_t logits_stride;
  int64_t dlogits_stride;
  int64_t num_tokens;  // T
  int vocab;  // V, at most kMaxVocab
  int64_t ignore_index;
  float z_loss;
  int device;
};

// Null, or what went wrong.
const char* softmax_loss(const SoftmaxLossParams& params, void* stream);

}  // namespace dsv3rt
