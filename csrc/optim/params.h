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

constexpr int kMaxAdamWFp8Tensors = 288;

// Matrices (X, R, C) whose new weights leave as E4M3 of their rounding to BF16, with a scale for each 128x128 tile.
struct AdamWFp8Tensor {
  float* master;           // (X, R, C), contiguous, as are grad, m, v and data
  const void* grad;
  void* m;
  void* v;
  uint8_t* data;
  float* scale;            // (X, r, c), contiguous
  uint8_t* data_t;         // (X, C, R), rows data_t_stride apart and matrices behind each other; null: not wanted
  float* scale_t;          // (X, c, r), rows scale_t_stride apart and matrices behind each other
  int64_t data_t_stride;
  int64_t scale_t_stride;
  int num_matrices, num_rows, num_columns;
  bool vectorised;  // every row starts on 16 bytes (8 in data), C % 8 == 0; of data_t too, and then R % 16 == 0
  RoundingKey key;  // looked at if the moments are rounded stochastically
};

struct AdamWFp8Params {
  AdamWNumbers numbers;
  const float* grad_scale;  // one number on the device; null: 1
  OptimType grad, moment;
  bool stochastic;  // rounding of BF16 moments
  int num_tensors;
  AdamWFp8Tensor tensors[kMaxAdamWFp8Tensors];
  int first_block[kMaxAdamWFp8Tensors + 1];  // filled in by the launch
};

struct NormTensor {
  const void* data;  // contiguous
  int64_t num_elements;
};

struct GradNormsParams {
  double* partial;  // one for each block of kNormBlockElements, tensor after tensor
  double* norms;  // of this launch's tensors
  OptimType type;
  int num_tensors;
  NormTensor tensors[kMaxNormTensors];
  int first_block[kMaxNormTensors + 1];  // filled in by the launch
};

constexpr int kAdamWBlockElements = 4096;
constexpr int kNormBlockElements = 32768;

// Null, or what went wrong.
const char* adamw_step(AdamWParams& params, int device, void* stream);
const char* adamw_step_fp8(AdamWFp8Params& params, int device, void* stream);
const char* grad_norms(GradNormsParams& params, int device, void* stream);

}  // namespace dsv3rt
