// Contracts of the optimizer kernels; no CUDA headers, so that the binding module needs none. Lists of tensors travel
// as kernel arguments: nothing is copied to the device beforehand.
#pragma once

#include <cstdint>

#include "common/adamw.h"

namespace dsv3rt {

enum class OptimType : uint8_t { kNone, kBFloat16, kFloat32 };

// What one launch takes; longer lists take several. The arguments of a kernel may be 32764 bytes.
constexpr int kMaxAdamWTensors = 448;
constexpr int kMaxNormTensors = 1024;

struct AdamWTensor {
  float* master;       // all contiguous, num_elements long
  const void* grad;
  void* m;
  void* v;
  void* param;         // null with OptimType::kNone
  int64_t num_elements;
  RoundingKey key;     // looked at if the moments are rounded stochastically
};

struct AdamWParams {
  AdamWNumbers numbers;
  const float* grad_scale;  // one number on the device; null: 1
  OptimType grad, moment, param;
  bool stochastic;          // rounding of BF16 moments
  int num_tensors;
  AdamWTensor tensors[kMaxAdamWTensors];
  int first_block[kMaxAdamWTensors + 1];  // filled in by the launch
};

struct NormTensor {
  const void* data;  // contiguous
  int64_t num_elements;
};

struct GradNormsParams {
  double* partial;  // one for each block of kNormBlockElements, tensor after tensor
  double* norms;    // of this launch's tensors
  OptimType type;
  int num_tensors;
  NormTensor tensors[kMaxNormTensors];
  int first_block[kMaxNormTensors + 1];  // filled in by the launch
};

constexpr int kAdamWBlockElements = 4096;
constexpr int kNormBlockElements = 32768;

// Null, or what went wrong.
const char* adamw_step(AdamWParams& params, int device, void* stream);
const char* grad_norms(GradNormsParams& params, int device, void* stream);

}  // namespace dsv3rt
