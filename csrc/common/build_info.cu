#include "common/build_info.h"

#include <cuda_runtime_api.h>

namespace dsv3rt {

BuildInfo build_info() { return {CUDART_VERSION, "sm_90a"}; }

}  // namespace dsv3rt
