// Contract of the FP8 GEMM kernels; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

enum class ScaleB : uint8_t { kBlock128, kRow };         // 128x128 tiles of B, or 1x128 along its rows
enum class GemmOutput : uint8_t { kBFloat16, kFloat32, kFloat32Add };
enum class Grouping : uint8_t { kNone, kRows, kDepth };  // rows: a B for each group; depth: a D for each, K split

// D[m, n] (+)= sum_k A[m, k] scale_a[k / 128][m] B[n, k] scale_b
struct GemmParams {
  const uint8_t* a;         // (m, k) e4m3, rows stride_a bytes apart
  const uint8_t* b;         // (n, k), with kRows (groups, n, k)
  const float* scale_a;     // scale_a[k / 128 * stride_scale_a + row]
  const float* scale_b;     // kBlock128: (groups, ceil(n / 128), ceil(k / 128)); kRow: like scale_a
  void* d;                  // (m, n), rows stride_d elements apart; with kDepth (groups, m, n)
  const int32_t* counts;    // (groups,) on the device: true rows (kRows) or depth (kDepth) of each group
  const int32_t* offsets;   // (groups + 1,) on the device: first row or depth, multiples of 128
  int64_t stride_a, stride_b, stride_d;
  int64_t stride_scale_a, stride_scale_b;
  int m, n, k;              // kRows: m counts every row of the buffer; kDepth: k counts the whole depth
  int num_groups;
  int num_sms;              // 0: all
  int device;
  ScaleB scale_b_kind;
  GemmOutput output;
  Grouping grouping;
  int32_t* parts_added;     // (num_sms, 16) zeros, left as zeros; only for kernels that spread their last wave
};

struct GemmChoice;

// Returns null, or what went wrong. `forced` (may be null) overrides the heuristics.
const char* fp8_gemm_nt(GemmParams params, const GemmChoice* forced, void* stream);

}  // namespace dsv3rt
