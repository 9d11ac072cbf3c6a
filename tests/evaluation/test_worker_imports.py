"""A worker must fork before anything asks a driver: on a GPU host its children could not use the GPU otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

SPY = """
import torch
asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append("runtime") or 0
torch.cuda._raw_device_count_nvml = lambda: asked.append("nvml") or 1
from specgen_engine.evaluation.worker_main import import_for_children
import_for_children("cuda:0")
import torch.utils.cpp_extension as extension
print(extension.CUDA_HOME, asked)
"""


def test_importing_asks_neither_the_cuda_runtime_nor_nvml() -> None:
    environment = {**os.environ, "CUDA_HOME": "/some/toolkit"}  # with one, cpp_extension looks for a GPU when imported
    done = subprocess.run([sys.executable, "-c", SPY], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split("\n")[0] == "/some/toolkit []", done.stderr
