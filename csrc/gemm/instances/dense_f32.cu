#include "gemm/launch.cuh"

namespace dsv3rt {

template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32, Grouping::kNone>(const GemmChoice&);

}  // namespace dsv3rt
