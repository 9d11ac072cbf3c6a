#pragma once

#include <pybind11/pybind11.h>

namespace specgen::apis {

void register_errors(pybind11::module_& module);
void register_channel(pybind11::module_& module);
void register_ledger(pybind11::module_& module);
void register_memory(pybind11::module_& module);
void register_copy(pybind11::module_& module);
#ifdef SPECGEN_WITH_CUDA
void register_cuda(pybind11::module_& module);
void register_baselines(pybind11::module_& module);
#endif

}  // namespace specgen::apis
