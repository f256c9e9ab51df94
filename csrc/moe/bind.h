#pragma once

#include <pybind11/pybind11.h>

namespace dsv3rt {

void bind_moe(pybind11::module_& module);

}  // namespace dsv3rt
