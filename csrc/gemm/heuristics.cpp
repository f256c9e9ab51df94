#include "gemm/heuristics.h"

#include "common/math.h"

namespace dsv3rt {
namespace {

// Measured clocks of one 128-deep step of a tile without its share of L2 traffic, and of a tile beside its steps
// (docs/notes/gemm.md).
struct TileCost {
  double step, step_row_scaled, tile;
};

TileCost cost_of(TileShape tile) {
  if (tile.m == 256) return {1026, 0, 1500};
  if (tile.m == 192) return {780, 1240, 800};
  if (tile.n == 192) return {772, 0, 700};
  if (tile.n == 128) return {540, 890, 600};
  return {350, 600, 400};
}

double step_clocks(const GemmProblem& problem, TileShape tile, Share share) {
  constexpr double kL2BytesAClock = 400;
  const int rows_and_columns = share == Share::kA   ? tile.m / 2 + tile.n
                               : share == Share::kB ? tile.m + tile.n / 2
                                                    : tile.m + tile.n;
  if (problem.scale_b_kind == ScaleB::kRow) {
    // Promotion of row scales takes longer than the loads: a cluster only makes its blocks wait for each other, unless
    // four stages let them drift and the clock gains from fewer reads of L2.
    const int cluster = tile.m == 192 && share == Share::kA ? -10 : 40;
    return cost_of(tile).step_row_scaled + (share == Share::kNone ? 0 : cluster);
  }
  return cost_of(tile).step + 128 * rows_and_columns / kL2BytesAClock;
}

double tile_overhead(const GemmProblem& problem, TileShape tile) {
  return cost_of(tile).tile * (problem.output == GemmOutput::kBFloat16 ? 1 : 2);
}

int64_t tiles_of(const GemmProblem& problem, TileShape tile) {
  return ceil_div(problem.m, int64_t(tile.m)) * ceil_div(problem.n, tile.n);
}

}  // namespace

bool is_usable(const GemmProblem& problem, TileShape tile, Share share) {
  if (!is_compiled(tile, share, problem.scale_b_kind, problem.output, problem.grouping)) return false;
  if (share == Share::kDepth) return 2 * tiles_of(problem, tile) <= problem.num_sms;
  if (share != Share::kNone && (problem.num_sms < 2 || problem.m <= tile.m)) return false;
  return problem.scale_b_kind == ScaleB::kBlock128 || !pairs_rows(tile) || problem.n % kPairedRowGroup == 0;
}

double predicted_clocks(const GemmProblem& problem, TileShape tile, Share share) {
  if (share == Share::kDepth) {
    // Nothing is loaded once for both blocks, which costs more than the traffic (4096x512x32768); the sums' exchange.
    constexpr double kSlowerStep = 1.1, kExchange = 3000;
    const int64_t steps = ceil_div(ceil_div(problem.k, int64_t(128)), int64_t(2));
    return steps * kSlowerStep * step_clocks(problem, tile, share) + tile_overhead(problem, tile) + kExchange;
  }
  const int64_t groups = problem.num_groups > 1 ? problem.num_groups : 1;
  const int64_t m_a_group = problem.grouping == Grouping::kRows ? ceil_div(problem.m, groups) : problem.m;
  const int64_t k_a_tile = problem.grouping == Grouping::kDepth ? ceil_div(problem.k, groups) : problem.k;
  int64_t m_blocks = ceil_div(m_a_group, int64_t(tile.m));
  if (problem.grouping == Grouping::kRows) m_blocks *= groups;
  int64_t n_blocks = ceil_div(problem.n, tile.n);
  int64_t tiles_a_unit = 1;
  if (share == Share::kA) n_blocks = ceil_div(n_blocks, int64_t(2)), tiles_a_unit = 2;
  if (share == Share::kB) m_blocks = ceil_div(m_blocks, int64_t(2)), tiles_a_unit = 2;
  const int64_t units = m_blocks * n_blocks * (problem.grouping == Grouping::kDepth ? groups : 1);
  const int64_t slots = problem.num_sms / tiles_a_unit > 1 ? problem.num_sms / tiles_a_unit : 1;
  const double tile_clocks =
      ceil_div(k_a_tile, int64_t(128)) * step_clocks(problem, tile, share) + tile_overhead(problem, tile);
  return ceil_div(units, slots) * tile_clocks;
}

GemmChoice choose_gemm(const GemmProblem& problem) {
  GemmChoice best{kTileShapes[0], Share::kNone, 8};
  double best_clocks = -1;
  for (const TileShape tile : kTileShapes) {
    for (const Share share : kShares) {
      if (!is_usable(problem, tile, share)) continue;
      const double clocks = predicted_clocks(problem, tile, share);
      if (best_clocks < 0 || clocks < best_clocks) {
        best_clocks = clocks;
        best.tile = tile;
        best.share = share;
      }
    }
  }
  // Bands about 2048 rows high keep the operands of one wave of tiles in L2.
  const int unit_rows = best.tile.m * (best.share == Share::kB ? 2 : 1);
  best.band = unit_rows < 2048 ? 2048 / unit_rows : 1;
  return best;
}

}  // namespace dsv3rt
