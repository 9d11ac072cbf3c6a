// Conversions between tensors and Python objects, and of exceptions, without bindings of C++ modules.
#pragma once
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>
