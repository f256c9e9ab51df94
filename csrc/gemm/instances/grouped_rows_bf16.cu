#include "gemm/launch.cuh"

namespace dsv3rt {

template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kBFloat16, Grouping::kRows>(const GemmChoice&);

}  // namespace dsv3rt
