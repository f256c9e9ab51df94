#pragma once

#include <pybind11/pybind11.h>

namespace dsv3rt {

void bind_comm(pybind11::module_& module);

}  // namespace dsv3rt
