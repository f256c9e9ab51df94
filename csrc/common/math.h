#pragma once

#if defined(__CUDACC__)
#define DSV3RT_HOST_DEVICE __host__ __device__
#else
#define DSV3RT_HOST_DEVICE
#endif

namespace dsv3rt {

template <typename Integer>
DSV3RT_HOST_DEVICE constexpr Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename Integer>
DSV3RT_HOST_DEVICE constexpr Integer round_up(Integer value, Integer factor) {
  return ceil_div(value, factor) * factor;
}

}  // namespace dsv3rt
