#include "gemm/heuristics.h"

#include <algorithm>

#include "common/math.h"

namespace dsv3rt {
namespace {

// Clocks of one 128-deep step of a tile: the slowest of tensor cores (4096 multiply-adds a clock), shared memory
// (128 bytes a clock; every 64-row wave reads B again, and the copy engine writes both operands) and L2.
double step_clocks(const GemmProblem& problem, TileShape tile, Share share) {
  const double m = tile.m, n = tile.n;
  const double multiply = m * n * 128 / 4096;
  const double shared = (m / 64 * (8192 + 128 * n) + 128 * (m + n)) / 128;
  const double l2_bytes = 128 * (share == Share::kA ? m / 2 + n : share == Share::kB ? m + n / 2 : m + n);
  const double promote = problem.scale_b_kind == ScaleB::kRow ? m * n / 64 * 0.45 : 0;
  return std::max({multiply, shared, l2_bytes / 40, promote}) + 24;
}

double tile_overhead(const GemmProblem& problem, TileShape tile) {
  const double bytes = problem.output == GemmOutput::kBFloat16 ? 2 : 4;
  return 600 + tile.m * tile.n * bytes / 64;
}

}  // namespace

double predicted_clocks(const GemmProblem& problem, TileShape tile, Share share) {
  const int64_t groups = std::max(problem.num_groups, 1);
  const int64_t m_a_group = problem.grouping == Grouping::kRows ? ceil_div(problem.m, groups) : problem.m;
  const int64_t k_a_tile = problem.grouping == Grouping::kDepth ? ceil_div(problem.k, groups) : problem.k;
  int64_t m_blocks = ceil_div(m_a_group, int64_t(tile.m));
  if (problem.grouping == Grouping::kRows) m_blocks *= groups;
  int64_t n_blocks = ceil_div(problem.n, tile.n);
  int64_t tiles_a_unit = 1;
  if (share == Share::kA) n_blocks = ceil_div(n_blocks, int64_t(2)), tiles_a_unit = 2;
  if (share == Share::kB) m_blocks = ceil_div(m_blocks, int64_t(2)), tiles_a_unit = 2;
  const int64_t units = m_blocks * n_blocks * (problem.grouping == Grouping::kDepth ? groups : 1);
  const int64_t slots = std::max<int64_t>(problem.num_sms / tiles_a_unit, 1);
  const double tile_clocks =
      ceil_div(k_a_tile, int64_t(128)) * step_clocks(problem, tile, share) + tile_overhead(problem, tile);
  return ceil_div(units, slots) * tile_clocks;
}

GemmChoice choose_gemm(const GemmProblem& problem) {
  GemmChoice best{kTileShapes[0], Share::kNone, 8};
  double best_clocks = -1;
  for (const TileShape tile : kTileShapes) {
    for (const Share share : {Share::kNone, Share::kA, Share::kB}) {
      if (share == Share::kB && problem.grouping == Grouping::kRows) continue;  // neighbours may belong to two groups
      if (share != Share::kNone && problem.num_sms < 2) continue;
      const double clocks = predicted_clocks(problem, tile, share);
      if (best_clocks < 0 || clocks < best_clocks) {
        best_clocks = clocks;
        best.tile = tile;
        best.share = share;
      }
    }
  }
  // Bands about 2048 rows high keep the operands of one wave of tiles in L2.
  best.band = std::max(1, 2048 / (best.tile.m * (best.share == Share::kB ? 2 : 1)));
  return best;
}

}  // namespace dsv3rt
