// pybind11 caster: any Python object that speaks DLPack becomes a TensorView for the duration of a call.
//
// Producers with the C exchange API (torch 2.10 and newer) are read without a Python call; others (CuPy, JAX, older
// torch) through __dlpack__. Nothing is synchronised: the caller orders the work by the stream it launches on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/tensor.h"

namespace dsv3rt {

inline DataType data_type_of(dlpack::ElementType type) {
  if (type.lanes != 1) return DataType::kOther;
  switch (type.code) {
    case dlpack::kFloat: return type.bits == 32 ? DataType::kFloat32 : DataType::kOther;
    case dlpack::kBFloat: return type.bits == 16 ? DataType::kBFloat16 : DataType::kOther;
    case dlpack::kFloat8E4M3FN: return DataType::kFloat8E4M3;
    case dlpack::kUInt: return type.bits == 8 ? DataType::kUInt8 : DataType::kOther;
    case dlpack::kInt:
      return type.bits == 32 ? DataType::kInt32 : type.bits == 64 ? DataType::kInt64 : DataType::kOther;
    default: return DataType::kOther;
  }
}

inline TensorView view_of(const dlpack::Tensor& tensor) {
  if (tensor.rank > kMaxRank) {
    throw pybind11::value_error("array must have at most " + std::to_string(kMaxRank) + " dimensions, got " +
                                std::to_string(tensor.rank));
  }
  TensorView view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = data_type_of(tensor.type);
  view.device = tensor.device;
  view.rank = tensor.rank;
  int64_t compact = 1;
  for (int axis = tensor.rank - 1; axis >= 0; --axis) {
    view.shape[axis] = tensor.shape[axis];
    view.strides[axis] = tensor.strides ? tensor.strides[axis] : compact;
    compact *= tensor.shape[axis];
  }
  return view;
}

}  // namespace dsv3rt

namespace pybind11::detail {

template <>
struct type_caster<dsv3rt::TensorView> {
  PYBIND11_TYPE_CASTER(dsv3rt::TensorView, const_name("DLPackArray"));

  bool load(handle source, bool /*convert*/) {
    if (load_by_exchange_api(source) || load_by_capsule(source)) return true;
    // Returning false would make pybind11 print every argument in full.
    throw type_error("an argument must be a DLPack array, got " + std::string(Py_TYPE(source.ptr())->tp_name));
  }

 private:
  object owner_;  // keeps a capsule's memory alive until the call returns

  bool load_by_exchange_api(handle source) {
    const handle type = type::handle_of(source);
    if (!hasattr(type, "__dlpack_c_exchange_api__")) return false;
    const object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dsv3rt::dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) {
      PyErr_Clear();
      return false;
    }
    while (api != nullptr && api->version.major != dsv3rt::dlpack::kMajorVersion) api = api->older;
    if (api == nullptr || api->tensor_from_object == nullptr) return false;
    dsv3rt::dlpack::Tensor tensor{};
    if (api->tensor_from_object(source.ptr(), &tensor) != 0) throw error_already_set();
    value = dsv3rt::view_of(tensor);
    value.current_stream = api->current_stream;
    return true;
  }

  bool load_by_capsule(handle source) {
    if (!hasattr(source, "__dlpack__")) return false;
    owner_ = call_dlpack(source);
    if (PyCapsule_IsValid(owner_.ptr(), "dltensor_versioned")) {
      value = dsv3rt::view_of(
          static_cast<dsv3rt::dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor_versioned"))
              ->tensor);
    } else {
      auto* managed = static_cast<dsv3rt::dlpack::ManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"));
      if (managed == nullptr) throw error_already_set();
      value = dsv3rt::view_of(managed->tensor);
    }
    return true;  // the capsule keeps its name, so its own destructor frees the tensor
  }

  static object call_dlpack(handle source) {
    const tuple device = source.attr("__dlpack_device__")();
    const bool on_cuda = device[0].cast<int>() == dsv3rt::dlpack::kCuda;
    dict arguments;
    if (on_cuda) arguments["stream"] = -1;  // no synchronisation by the producer
    arguments["max_version"] = make_tuple(dsv3rt::dlpack::kMajorVersion, 0);
    try {
      return source.attr("__dlpack__")(**arguments);
    } catch (error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      arguments.attr("pop")("max_version");  // a producer older than DLPack 1.0
      return source.attr("__dlpack__")(**arguments);
    }
  }
};

}  // namespace pybind11::detail
