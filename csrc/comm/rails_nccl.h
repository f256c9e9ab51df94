// NCCL's headers for kernels that put between nodes, where the build has them.
#pragma once

#include "comm/rails.h"

#if __has_include(<nccl_device.h>)
#include <nccl.h>
#endif
// The first version whose waits for puts may end by a timeout.
#if defined(NCCL_VERSION_CODE) && NCCL_VERSION_CODE >= 23200
// By a thread of the host (InfiniBand, or any plugin for one-sided puts), or by the GPU itself on a ConnectX. NCCL's
// other ways need local memory in kernels.
#define NCCL_GIN_GPI_ENABLE 0
#define NCCL_GIN_EFA_GDA_ENABLE 0
#include <nccl_device.h>
#define DSV3RT_HAS_RAILS 1

namespace dsv3rt {

struct Rails {
  ncclDevComm device;
  ncclWindow_t window;
};

constexpr ncclGinType_t kRailTypes[] = {NCCL_GIN_TYPE_PROXY, NCCL_GIN_TYPE_GDAKI};

}  // namespace dsv3rt
#else
#define DSV3RT_HAS_RAILS 0

namespace dsv3rt {

struct Rails {};

}  // namespace dsv3rt
#endif
