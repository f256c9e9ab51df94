#pragma once

#include <pybind11/pybind11.h>

namespace dsv3rt {

void bind_quant(pybind11::module_& module);
void bind_norm(pybind11::module_& module);

}  // namespace dsv3rt
