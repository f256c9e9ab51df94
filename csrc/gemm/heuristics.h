// (problem, device) -> tile. Pure functions: tests run them without a GPU.
#pragma once

#include <cstdint>

#include "gemm/params.h"

namespace dsv3rt {

// Which operand a cluster of two blocks loads once for both: A when they are neighbours along n, B along m.
enum class Share : uint8_t { kNone, kA, kB };

struct TileShape {
  int m, n;
};

constexpr TileShape kTileShapes[] = {{128, 64}, {128, 128}, {128, 192}, {192, 128}, {256, 128}};
constexpr int kNumTileShapes = sizeof(kTileShapes) / sizeof(TileShape);

// Which kernels are compiled. Row scales need two partial sums beside the sum, FP32 tiles twice the shared memory: both
// stop at 128x128. Large tiles always come in clusters. Neighbours along m may belong to two groups of rows.
constexpr bool is_compiled(TileShape tile, Share share, ScaleB scale_b, GemmOutput output, Grouping grouping) {
  const bool small = tile.m * tile.n <= 128 * 128;
  if (!small && (scale_b == ScaleB::kRow || output != GemmOutput::kBFloat16 || share == Share::kNone)) return false;
  return share != Share::kB || grouping != Grouping::kRows;
}

struct GemmProblem {
  int64_t m;  // rows; with kRows the expected rows of all groups together
  int n;
  int64_t k;  // depth; with kDepth of all groups together
  int num_groups;
  int num_sms;
  ScaleB scale_b_kind;
  GemmOutput output;
  Grouping grouping;
};

struct GemmChoice {
  TileShape tile;
  Share share;
  int band;  // row units walked together, see TileRaster
};

// Predicted SM clocks; only comparisons mean something.
double predicted_clocks(const GemmProblem& problem, TileShape tile, Share share);

GemmChoice choose_gemm(const GemmProblem& problem);

}  // namespace dsv3rt
