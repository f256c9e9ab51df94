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

// Runs `launch`, which returns null or what went wrong, on the device of the data.
template <class Launch>
const char* on_device(int device, void* stream, Launch launch) {
  const DeviceGuard guard(device);
  DSV3RT_CUDA_CHECK(guard.status());
  const char* error = launch(static_cast<cudaStream_t>(stream));
  if (error != nullptr) return error;
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

// A kernel that may start before its predecessor has ended, and waits for it itself (wait_for_prior_grid).
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, size_t shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace dsv3rt
