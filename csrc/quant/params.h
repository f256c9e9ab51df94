// Contract of the quantisation kernels; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

enum class QuantInput : uint8_t { kBFloat16, kFloat32 };

struct Quantize1x128Params {
  const void* x;         // (T, D), rows x_stride elements apart, 16-byte aligned
  uint8_t* data;         // (T, D) e4m3, contiguous
  float* scale;          // scale[tile * scale_stride + row], tile < ceil(D / 128)
  uint8_t* data_t;       // (D, Tp) e4m3, Tp = round_up(T, 128); null: no transposed output
  float* scale_t;        // scale_t[row_tile * scale_t_stride + column], row_tile < Tp / 128
  int64_t x_stride;
  int64_t scale_stride;
  int64_t scale_t_stride;
  int64_t num_rows;      // T
  int num_columns;       // D, a multiple of 16
  QuantInput input;
  bool pow2_scales;
  int device;
};

// Returns null, or what went wrong.
const char* quantize_1x128(const Quantize1x128Params& params, void* stream);

}  // namespace dsv3rt
