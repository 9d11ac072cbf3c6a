// Tensors without modules, optimisers, data loaders and TorchScript.
#pragma once
#include <torch/cuda.h>
#include <torch/types.h>
#include <torch/version.h>
