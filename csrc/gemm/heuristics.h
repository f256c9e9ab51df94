// (problem, device) -> tile. Pure functions: tests run them without a GPU.
#pragma once

#include <cstdint>

#include "gemm/params.h"

namespace dsv3rt {

// What a cluster of two blocks shares: A when they are neighbours along n and B along m, loaded once for both, or the
// depth of one tile, of which each computes half.
enum class Share : uint8_t { kNone, kA, kB, kDepth };
constexpr Share kShares[] = {Share::kNone, Share::kA, Share::kB, Share::kDepth};

struct TileShape {
  int m, n;
};

constexpr TileShape kTileShapes[] = {{128, 64}, {128, 128}, {128, 192}, {192, 128}, {256, 128}};
constexpr int kNumTileShapes = sizeof(kTileShapes) / sizeof(TileShape);

// With row scales on both sides these tiles take the rows of B, 16 at a time, in an order that gives each thread four
// neighbouring columns of D: their scales are one load, and so is their way out. They need n to be a multiple of 16.
constexpr int kPairedRowGroup = 16;
constexpr bool pairs_rows(TileShape tile) { return tile.n == 128; }

// Which kernels are compiled. FP32 tiles and double partial sums take room: they stop at 128x128, or at 192x128 for
// weight gradients, which are added or start a sum. Large tiles always come in clusters. Neighbours along m may belong
// to two groups of rows.
constexpr bool is_compiled(TileShape tile, Share share, ScaleB scale_b, GemmOutput output, Grouping grouping) {
  if (share == Share::kB && grouping == Grouping::kRows) return false;
  if (share == Share::kDepth) {
    return tile.m != 192 && tile.n == 128 && scale_b == ScaleB::kBlock128 && output == GemmOutput::kBFloat16 &&
           grouping == Grouping::kNone;
  }
  if (tile.m * tile.n <= 128 * 128) return true;
  if (scale_b == ScaleB::kRow) return tile.m == 192 && output != GemmOutput::kBFloat16;
  return output == GemmOutput::kBFloat16;
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

// Whether a problem can be computed so: halves of a depth need a cluster for each tile, and paired rows whole pairs.
bool is_usable(const GemmProblem& problem, TileShape tile, Share share);

// Predicted SM clocks; only comparisons mean something.
double predicted_clocks(const GemmProblem& problem, TileShape tile, Share share);

GemmChoice choose_gemm(const GemmProblem& problem);

}  // namespace dsv3rt
