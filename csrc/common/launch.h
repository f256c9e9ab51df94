// Launching on the device of the data, with errors as text: kernel libraries throw nothing across their border.
#pragma once

#include <cuda_runtime.h>

#define DSV3RT_CUDA_CHECK(call)                                     \
  do {                                                              \
    const cudaError_t status_ = (call);                             \
    if (status_ != cudaSuccess) return cudaGetErrorString(status_); \
  } while (0)

namespace dsv3rt {

// Makes `device` current for a scope; the caller's device comes back afterwards. The device is set even where it is
// current already: a thread that has not used the GPU yet (such as autograd's) has no context before, and the driver's
// functions, unlike the runtime's, do not make one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess && previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_ = cudaSuccess;
};

}  // namespace dsv3rt
