// One place where the arguments of every kernel are checked; the messages name op, argument, rule and value.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/tensor.h"

namespace dsv3rt {

constexpr int64_t kAny = -1;

class ArgCheck {
 public:
  ArgCheck(const char* op, const char* name, const TensorView& view) : op_(op), name_(name), view_(view) {}

  const ArgCheck& on_cuda() const {
    if (view_.device.type != dlpack::kCuda) fail("must be a CUDA array", "device type " + str(view_.device.type));
    return *this;
  }

  const ArgCheck& on_device_of(const TensorView& other, const char* other_name) const {
    if (view_.device.type != other.device.type || view_.device.index != other.device.index) {
      fail(std::string("must be on the device of ") + other_name + " (index " + str(other.device.index) + ")",
           "type " + str(view_.device.type) + " index " + str(view_.device.index));
    }
    return *this;
  }

  const ArgCheck& dtype(std::initializer_list<DataType> allowed) const {
    std::string names;
    for (const DataType candidate : allowed) {
      if (view_.dtype == candidate) return *this;
      names += (names.empty() ? "" : " or ") + std::string(name_of(candidate));
    }
    throw pybind11::type_error(prefix() + "must be " + names + ", got " + name_of(view_.dtype));
  }

  // kAny stands for any extent or stride. Strides that no address depends on are not compared: those of axes with one
  // element, and of empty arrays.
  const ArgCheck& shape(std::initializer_list<int64_t> expected) const {
    bool matches = static_cast<int>(expected.size()) == view_.rank;
    int axis = 0;
    for (const int64_t extent : expected) {
      matches = matches && (extent == kAny || view_.shape[axis] == extent);
      ++axis;
    }
    if (!matches) fail("must have shape " + tuple_of(expected), tuple_of(view_.shape.data(), view_.rank));
    return *this;
  }

  const ArgCheck& strides(std::initializer_list<int64_t> expected) const {
    bool matches = static_cast<int>(expected.size()) == view_.rank;
    int axis = 0;
    for (const int64_t stride : expected) {
      if (matches && stride != kAny && stride_matters(axis)) matches = view_.strides[axis] == stride;
      ++axis;
    }
    if (!matches) fail("must have strides " + tuple_of(expected), tuple_of(view_.strides.data(), view_.rank));
    return *this;
  }

  const ArgCheck& stride_multiple_of(int axis, int64_t factor) const {
    if (stride_matters(axis) && view_.strides[axis] % factor != 0) {
      fail("must have a stride divisible by " + str(factor) + " along axis " + str(axis), str(view_.strides[axis]));
    }
    return *this;
  }

  const ArgCheck& stride_at_least(int axis, int64_t least) const {
    if (stride_matters(axis) && view_.strides[axis] < least) {
      fail("must have a stride of at least " + str(least) + " along axis " + str(axis), str(view_.strides[axis]));
    }
    return *this;
  }

  const ArgCheck& aligned(int bytes) const {
    const auto address = reinterpret_cast<uintptr_t>(view_.data);
    if (view_.num_elements() > 0 && address % bytes != 0) {
      fail("must be aligned to " + str(bytes) + " bytes", "an address that is " + str(address % bytes) + " past one");
    }
    return *this;
  }

  [[noreturn]] void fail(const std::string& rule, const std::string& got) const {
    throw pybind11::value_error(prefix() + rule + ", got " + got);
  }

 private:
  bool stride_matters(int axis) const { return view_.shape[axis] > 1 && view_.num_elements() > 0; }

  template <typename Number>
  static std::string str(Number number) {
    return std::to_string(number);
  }

  static std::string tuple_of(const int64_t* values, int count) {
    std::string text = "(";
    for (int i = 0; i < count; ++i) text += (i ? ", " : "") + (values[i] == kAny ? std::string("any") : str(values[i]));
    return text + ")";
  }
  static std::string tuple_of(std::initializer_list<int64_t> values) {
    return tuple_of(values.begin(), static_cast<int>(values.size()));
  }

  std::string prefix() const { return std::string(op_) + ": " + name_ + " "; }

  const char* op_;
  const char* name_;
  const TensorView& view_;
};

// The stream to launch on: the caller's, else the current one of the array's framework.
inline void* stream_for(const char* op, const TensorView& view, pybind11::handle stream) {
  if (!stream.is_none()) return reinterpret_cast<void*>(stream.cast<uintptr_t>());
  if (view.current_stream == nullptr) {
    throw pybind11::value_error(std::string(op) +
                                ": stream must be given for arrays without the DLPack C exchange API, got None");
  }
  void* current = nullptr;
  if (view.current_stream(view.device.type, view.device.index, &current) != 0) throw pybind11::error_already_set();
  return current;
}

inline void throw_on_error(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
}

}  // namespace dsv3rt
