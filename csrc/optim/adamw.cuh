// adamw_step: a list of tensors in one launch, each byte moved once.
#pragma once

#include "common/adamw.cuh"
#include "common/octet.cuh"
#include "optim/tensor_list.cuh"

namespace dsv3rt {

constexpr int kAdamWThreads = 256;

struct AdamWOctet {
  float master[kOctet], grad[kOctet], m[kOctet], v[kOctet];
};

template <typename Moment>
struct AdamWStep {
  AdamWNumbers numbers;
  float grad_scale;
  bool stochastic;
  RoundingKey key;

  __device__ __forceinline__ void update(int64_t element, float grad, float& master, float& m, float& v) const {
    adamw_update(numbers, __fmul_rn(grad, grad_scale), master, m, v);
    if constexpr (sizeof(Moment) == 2) {
      if (stochastic) {
        const uint32_t random = rounding_bits(key, element);
        m = round_stochastically(m, random & 0xffffu);
        v = round_stochastically(v, random >> 16);
      }
    }
  }
};

// Gradients and what a step changes of a tensor, but for copies of the weights.
template <typename Grad, typename Moment>
struct AdamWState {
  float* master;
  const Grad* grad;
  Moment* m;
  Moment* v;

  __device__ __forceinline__ AdamWState(float* master_, const void* grad_, void* m_, void* v_)
      : master(master_),
        grad(static_cast<const Grad*>(grad_)),
        m(static_cast<Moment*>(m_)),
        v(static_cast<Moment*>(v_)) {}

  // Octets may be read and written as such.
  __device__ __forceinline__ bool aligned() const {
    const auto bits = reinterpret_cast<uintptr_t>(master) | reinterpret_cast<uintptr_t>(grad) |
                      reinterpret_cast<uintptr_t>(m) | reinterpret_cast<uintptr_t>(v);
    return bits % 16 == 0;
  }

  __device__ __forceinline__ void load(int64_t at, AdamWOctet& octet) const {
    load_octet(grad + at, octet.grad);
    load_octet(m + at, octet.m);
    load_octet(v + at, octet.v);
    load_octet(master + at, octet.master);
  }

  __device__ __forceinline__ void store(int64_t at, const AdamWOctet& octet) const {
    store_octet(master + at, octet.master);
    store_octet(m + at, octet.m);
    store_octet(v + at, octet.v);
  }

  // The new weight.
  __device__ __forceinline__ float update_one(const AdamWStep<Moment>& step, int64_t element) const {
    float new_master = master[element], new_m = load_one(m + element), new_v = load_one(v + element);
    step.update(element, load_one(grad + element), new_master, new_m, new_v);
    master[element] = new_master;
    store_one(m + element, new_m);
    store_one(v + element, new_v);
    return new_master;
  }
};

template <typename Grad, typename Moment, typename Param>
__global__ void __launch_bounds__(kAdamWThreads, 4) adamw_kernel(const __grid_constant__ AdamWParams params) {
  const int index = tensor_of_block(params.first_block, params.num_tensors);
  const AdamWTensor& tensor = params.tensors[index];
  const AdamWState<Grad, Moment> at(tensor.master, tensor.grad, tensor.m, tensor.v);
  Param* param = static_cast<Param*>(tensor.param);  // null: none
  const AdamWStep<Moment> step{params.numbers, params.grad_scale == nullptr ? 1.0f : *params.grad_scale,
                               params.stochastic, tensor.key};
  const int64_t size = tensor.num_elements;
  const int64_t first = int64_t(blockIdx.x - params.first_block[index]) * kAdamWBlockElements;
  const bool aligned = at.aligned() && reinterpret_cast<uintptr_t>(param) % 16 == 0;
  if (first + kAdamWBlockElements <= size && aligned) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kAdamWBlockElements / kOctet; i += kAdamWThreads) {
      const int64_t element = first + i * kOctet;
      AdamWOctet octet;
      at.load(element, octet);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        step.update(element + j, octet.grad[j], octet.master[j], octet.m[j], octet.v[j]);
      }
      at.store(element, octet);
      if (param != nullptr) store_octet(param + element, octet.master);
    }
  } else {
    const int64_t last = min(first + kAdamWBlockElements, size);
    for (int64_t element = first + threadIdx.x; element < last; element += kAdamWThreads) {
      const float master = at.update_one(step, element);
      if (param != nullptr) store_one(param + element, master);
    }
  }
}

}  // namespace dsv3rt
