"""A plain .cu as a model: compiled by nvcc into a shared library, its declared entry called through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...kv.toolchain import find_nvcc
from ..tensors import tensors_of
from .entry import Buffer, Entry, EntryError, parse_entry, value_of

DEFAULT_ARCH = "sm_90a"
_SCALARS = {
    "int": ctypes.c_int,
    "int64": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
}


class CompileError(RuntimeError):
    """nvcc's output."""


def compile_plain_cuda(source: str, folder: Path, arch: str = DEFAULT_ARCH) -> Path:
    """The library of a plain .cu in `folder`, built once. Needs no GPU.

    Raises CompileError with nvcc's output, or saying that there is no nvcc; EntryError.
    """
    entry = parse_entry(source)
    library = folder / f"{entry.name}-{arch}.so"
    if library.exists():
        return library
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc is not installed here (pip install nvidia-cuda-nvcc): plain CUDA can't be compiled")
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "candidate.cu"
    text.write_text(source)
    part = library.with_suffix(".part")
    code = f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"
    options = ["-O3", "-std=c++17", "-lineinfo", code, "-shared", "-Xcompiler", "-fPIC", *entry.flags]
    done = subprocess.run(
        [str(nvcc), *options, "-o", str(part), str(text)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompileError((done.stdout + done.stderr).strip() or f"nvcc ended with code {done.returncode}")
    os.replace(part, library)
    return library


def load_plain_cuda(source: str, folder: Path, device: str) -> ModuleType:
    """A module whose ModelNew calls the entry. Raises as compile_plain_cuda, or OSError when it can't be loaded."""
    build = Path(os.environ.get("TORCH_EXTENSIONS_DIR", folder)) / "plain"
    library = compile_plain_cuda(source, build, _arch_of(device))
    entry = parse_entry(source)
    function = getattr(ctypes.CDLL(str(library)), entry.name)
    function.restype = ctypes.c_int
    module = ModuleType("candidate_adapter")
    module.ModelNew = lambda *init: PlainCudaModel(entry, function, init)  # type: ignore[attr-defined]
    return module


def _arch_of(device: str) -> str:
    if not device.startswith("cuda"):
        return DEFAULT_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


class PlainCudaModel:
    """ModelNew over an entry. Inputs are passed as they lie in memory: strides are the entry's business."""

    def __init__(self, entry: Entry, function: Any, init: Sequence[Any]) -> None:
        self.entry, self.function = entry, function
        self.init = {f"init{index}": value for index, value in enumerate(init)}
        self.weights: dict[str, torch.Tensor] = {}

    def take_weights(self, given: dict[str, torch.Tensor]) -> None:
        for argument in self.entry.arguments:
            name = argument.text.removeprefix("weight.")
            if argument.text.startswith("weight.") and name not in given:
                raise EntryError(f"the reference has no weight {name!r}; it has {', '.join(given) or 'none'}")
        self.weights = given

    def __call__(self, *inputs: Any) -> Any:
        leaves = {f"in{index}": value for index, value in enumerate(_leaves(inputs))}
        tensors = tensors_of(list(inputs))
        if not tensors or not tensors[0].is_cuda:
            raise RuntimeError("a plain .cu needs a GPU: evaluate it with --device cuda:N")
        names = self.init | leaves
        made = {one.name: _make(one, names) for one in (*self.entry.outputs, *self.entry.scratch)}
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
        code = self.function(*(self._value(argument, names, made, stream) for argument in self.entry.arguments))
        if code:
            raise RuntimeError(f"{self.entry.name} returned CUDA error {code}")
        outputs = [made[one.name] for one in self.entry.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _value(self, argument: Any, names: dict[str, Any], made: dict[str, torch.Tensor], stream: int) -> Any:
        kind, text = argument
        if kind != "pointer":
            return _SCALARS[kind](value_of(text, names))
        if text == "stream":
            return ctypes.c_void_p(stream)
        known = made | {f"weight.{name}": tensor for name, tensor in self.weights.items()} | names
        tensor = known.get(text)
        if not isinstance(tensor, torch.Tensor):
            raise EntryError(f"{text} is no tensor here")
        return ctypes.c_void_p(tensor.data_ptr())


def _make(buffer: Buffer, names: dict[str, Any]) -> torch.Tensor:
    if buffer.like:
        return torch.empty_like(names[buffer.like])
    device = next(value.device for value in names.values() if isinstance(value, torch.Tensor))
    given = buffer.dtype.partition(".")
    dtype = names[given[0]].dtype if given[2] == "dtype" else getattr(torch, buffer.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EntryError(f"{buffer.name}: {buffer.dtype!r} is no dtype of torch")
    return torch.empty([int(value_of(size, names)) for size in buffer.shape], dtype=dtype, device=device)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
