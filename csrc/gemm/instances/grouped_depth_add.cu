#include "gemm/launch.cuh"

namespace dsv3rt {

template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kFloat32Add, Grouping::kDepth>(const GemmChoice&);

}  // namespace dsv3rt
