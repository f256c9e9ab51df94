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

// Every tile that is compiled. Widths are multiples of 64: others take as long as the next one (docs/notes/gemm.md).
constexpr TileShape kTileShapes[] = {{128, 64}, {128, 128}, {128, 192}, {256, 64}, {256, 128}};
constexpr int kNumTileShapes = sizeof(kTileShapes) / sizeof(TileShape);

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
