// Numbers of one AdamW step.
#pragma once

#include <cstdint>

namespace dsv3rt {

// Computed in double precision, then rounded.
struct AdamWNumbers {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float inverse_root;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float decay;         // 1 - lr * weight decay
  float rate;          // -lr / (1 - beta1^step)
};

// Of the random numbers that round the moments of one tensor in one step.
struct RoundingKey {
  uint32_t first, second;
};

}  // namespace dsv3rt
