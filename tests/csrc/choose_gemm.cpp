// choose_gemm m n k groups num_sms row_scaled grouping: prints "block_m block_n share band clocks" and, after it, the
// predicted clocks of every compiled alternative, one a line. Row-scaled products are added: weight gradients.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "gemm/heuristics.h"

int main(int argc, char** argv) {
  using namespace dsv3rt;
  if (argc != 8) return 2;
  const GemmProblem problem{std::atoll(argv[1]),
                            std::atoi(argv[2]),
                            std::atoll(argv[3]),
                            std::atoi(argv[4]),
                            std::atoi(argv[5]),
                            std::atoi(argv[6]) ? ScaleB::kRow : ScaleB::kBlock128,
                            std::atoi(argv[6]) ? GemmOutput::kFloat32Add : GemmOutput::kBFloat16,
                            static_cast<Grouping>(std::atoi(argv[7]))};
  const GemmChoice choice = choose_gemm(problem);
  std::printf("%d %d %d %d %f\n", choice.tile.m, choice.tile.n, int(choice.share), choice.band,
              predicted_clocks(problem, choice.tile, choice.share));
  for (const TileShape tile : kTileShapes) {
    for (const Share share : kShares) {
      if (!is_usable(problem, tile, share)) continue;
      std::printf("%d %d %d %f\n", tile.m, tile.n, int(share), predicted_clocks(problem, tile, share));
    }
  }
  return 0;
}
