#include "gemm/launch.cuh"

namespace dsv3rt {

template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kFloat32, Grouping::kDepth>(const GemmChoice&);

}  // namespace dsv3rt
