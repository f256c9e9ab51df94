// Contracts of the quantisation kernels; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

// Added to a scale's bits and then cleared in them: rounds it up to a power of two.
constexpr uint32_t kPow2ScaleMask = 0x7fffff;

enum class QuantInput : uint8_t { kBFloat16, kFloat32, kFloat8 };

// Rows of an expert-major buffer; both arrays on the device. Rows outside the counts are not read and count as zeros;
// rows past the last group are not written either.
struct RowGroups {
  const int* counts;   // (X,); null: every row is read and written
  const int* offsets;  // (X + 1,), multiples of 128
  int num_groups;      // X
};

// x (T, D) in tiles of 1x128, and x^T in the 128x1 tiles of x.
struct QuantOutput {
  uint8_t* data;         // (T, D) e4m3, contiguous
  float* scale;          // scale[tile * scale_stride + row], tile < ceil(D / 128); scale_stride a multiple of 4
  uint8_t* data_t;       // (D, Tp) e4m3, Tp = round_up(T, 128); null: no transposed output
  float* scale_t;        // scale_t[row_tile * scale_t_stride + column], row_tile < Tp / 128
  int64_t scale_stride;
  int64_t scale_t_stride;
  int64_t num_rows;      // T
  int num_columns;       // D, a multiple of 16
  uint32_t scale_mask;   // kPow2ScaleMask or 0
};

// With `rows`, for BF16 alone, the result's row i is x's row rows[i], read where groups have data.
struct Quantize1x128Params {
  const void* x;         // (T, D) BF16 or FP32, rows x_stride elements apart, 16-byte aligned
  const int* rows;       // (P,), P % 32 == 0, 16-byte aligned, or null: see below
  int64_t x_stride;
  QuantInput input;
  RowGroups groups;
  QuantOutput out;
  int device;
};

struct Quantize128x128Params {
  const void* w;         // (X, F, D) BF16 or FP32
  uint8_t* data;         // (X, F, D) e4m3, contiguous
  float* scale;          // (X, f, d), contiguous
  uint8_t* data_t;       // (X, D, F) e4m3, contiguous; null: no transposed output
  float* scale_t;        // (X, d, f), contiguous
  int64_t batch_stride;  // of w, in elements
  int64_t row_stride;
  int num_matrices;      // X
  int num_rows;          // F
  int num_columns;       // D
  QuantInput input;
  uint32_t scale_mask;   // kPow2ScaleMask or 0
  bool vectorised;       // every row starts on 16 bytes (8 in data), in data_t too, and D % 8 == 0
  int device;
};

// E4M3 with a scale for each 128x128 tile, all contiguous.
struct Transpose128x128Params {
  const uint8_t* data;   // (X, F, D)
  const float* scale;    // (X, f, d)
  uint8_t* data_t;       // (X, D, F)
  float* scale_t;        // (X, d, f)
  int num_matrices;      // X
  int num_rows;          // F
  int num_columns;       // D
  bool vectorised;       // every row starts on 16 bytes, on both sides
  int device;
};

// Gate and up beside each other, (T, 2F): BF16, or FP8 in tiles of 1x128. A row weight multiplies silu(gate) * up.
struct GateUpInput {
  const void* data;      // rows `stride` elements apart, 16-byte aligned
  const float* scale;    // FP8: scale[tile * scale_stride + row], tile < ceil(2F / 128)
  const float* weight;   // (T,); null: ones
  int64_t stride;
  int64_t scale_stride;
  int hidden;            // F
  QuantInput type;       // BF16 or FP8
};

struct SwigluParams {
  GateUpInput in;
  RowGroups groups;
  QuantOutput out;       // of T x F
  int device;
};

struct SwigluBackwardParams {
  GateUpInput in;           // hidden a multiple of 128
  const void* grad;         // (T, F) BF16, rows grad_stride elements apart, 16-byte aligned
  int64_t grad_stride;
  RowGroups groups;
  QuantOutput out;          // of T x 2F, both forms
  uint8_t* output_t;  // (F, Tp): the product, transposed, scales output_scale_t[row_tile * stride + column]; or null
  float* output_scale_t;
  int64_t output_scale_t_stride;
  float* weight_grad;  // (F / 128, T): sums over 128 columns each; given if and only if weights are
  int device;
};

// x, or x + residual rounded to BF16, divided by the root of its mean square, times the weight.
struct NormParams {
  const void* x;             // (T, D) BF16, rows x_stride elements apart, 16-byte aligned
  const void* residual;      // like x, rows residual_stride apart; null: none
  const void* weight;        // (D,) BF16 or FP32, 16-byte aligned
  void* sum;                 // (T, D) BF16, contiguous: x + residual; given if and only if the residual is
  void* y;                   // (T, D) BF16, contiguous; null: not wanted
  float* rstd;               // (T,)
  int64_t x_stride;
  int64_t residual_stride;
  float eps;
  float inverse_columns;     // 1 / D
  QuantInput weight_type;    // BF16 or FP32
  QuantOutput out;           // of T x D; data null: no casts, D a multiple of 8
  int device;
};

constexpr int kMinNormColumns = 64, kMaxNormColumns = 16384;

struct NormBackwardParams {
  const void* grad;           // (T, D) BF16, rows grad_stride elements apart, 16-byte aligned, as all inputs
  const void* x;
  const void* grad_residual;  // added to dx; null: none
  const void* weight;         // (D,) BF16 or FP32
  const float* rstd;          // (T,)
  void* dx;                   // (T, D) BF16, contiguous
  float* weight_parts;        // (num_parts, D) scratch: sums over the rows that one block takes
  float* weight_grad;         // (D,)
  int64_t grad_stride, x_stride, grad_residual_stride;
  int64_t num_rows;           // T
  int num_columns;            // D, a multiple of 8
  int num_parts;
  QuantInput weight_type;     // BF16 or FP32
  int device;
};

// Each returns null, or what went wrong.
const char* quantize_1x128(const Quantize1x128Params& params, void* stream);
const char* quantize_128x128(const Quantize128x128Params& params, void* stream);
const char* transpose_128x128(const Transpose128x128Params& params, void* stream);
const char* swiglu_quantize_1x128(const SwigluParams& params, void* stream);
const char* swiglu_backward_quantize_1x128(const SwigluBackwardParams& params, void* stream);
const char* rms_norm(const NormParams& params, void* stream);
const char* rms_norm_backward(const NormBackwardParams& params, void* stream);

}  // namespace dsv3rt
