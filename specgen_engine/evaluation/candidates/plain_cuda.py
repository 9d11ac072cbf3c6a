"""A plain .cu as a model: compiled by nvcc into a shared library, its declared entry called through ctypes."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ...kv.toolchain import find_nvcc
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


class _Plan(NamedTuple):
    """What a call with inputs of one layout needs; made once, since a call's host time is part of what is timed.

    buffers: (shape, strides or None, dtype) of outputs, then scratch.  arguments: a ctypes value, or (where, index)
    with where one of leaf, made, stream.
    """

    buffers: list[tuple[Sequence[int], Sequence[int] | None, torch.dtype]]
    arguments: list[Any]
    outputs: int


class PlainCudaModel:
    """ModelNew over an entry. Inputs are passed as they lie in memory: strides are the entry's business."""

    def __init__(self, entry: Entry, function: Any, init: Sequence[Any]) -> None:
        self.entry, self.function = entry, function
        self.init = {f"init{index}": value for index, value in enumerate(init)}
        self.weights: dict[str, torch.Tensor] = {}
        self.plans: dict[Any, _Plan] = {}

    def take_weights(self, given: dict[str, torch.Tensor]) -> None:
        """Raises EntryError naming a weight that the reference lacks."""
        for argument in self.entry.arguments:
            name = argument.text.removeprefix("weight.")
            if argument.text.startswith("weight.") and name not in given:
                raise EntryError(f"the reference has no weight {name!r}; it has {', '.join(given) or 'none'}")
        self.weights = given

    def __call__(self, *inputs: Any) -> Any:
        leaves = _leaves(inputs)
        device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)
        if device is None or device.type != "cuda":
            raise RuntimeError("a plain .cu needs a GPU: evaluate it with --device cuda:N")
        return self.run(leaves, device, torch.cuda.current_stream(device).cuda_stream)

    def run(self, leaves: list[Any], device: torch.device, stream: int) -> Any:
        """One call of the entry. Raises EntryError, RuntimeError with the code that it returned."""
        key = tuple((one.shape, one.stride(), one.dtype) if isinstance(one, torch.Tensor) else one for one in leaves)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self._plan(leaves)
        made = [
            torch.empty(shape, dtype=dtype, device=device)
            if strides is None
            else torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype in plan.buffers
        ]
        sources = {"leaf": leaves, "made": made}
        values = [
            (ctypes.c_void_p(stream) if one[0] == "stream" else ctypes.c_void_p(sources[one[0]][one[1]].data_ptr()))
            if type(one) is tuple
            else one
            for one in plan.arguments
        ]
        code = self.function(*values)
        if code:
            raise RuntimeError(f"{self.entry.name} returned CUDA error {code}")
        return made[0] if plan.outputs == 1 else tuple(made[: plan.outputs])

    def _plan(self, leaves: list[Any]) -> _Plan:
        names = self.init | {f"in{index}": value for index, value in enumerate(leaves)}
        buffers = (*self.entry.outputs, *self.entry.scratch)
        where = {f"in{index}": ("leaf", index) for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        where |= {one.name: ("made", index) for index, one in enumerate(buffers)}
        where["stream"] = ("stream", 0)
        arguments: list[Any] = []
        for kind, text in self.entry.arguments:
            if kind != "pointer":
                arguments.append(_SCALARS[kind](value_of(text, names)))
            elif text.startswith("weight."):
                arguments.append(ctypes.c_void_p(self.weights[text.removeprefix("weight.")].data_ptr()))
            elif text in where:
                arguments.append(where[text])
            else:
                raise EntryError(f"{text} is no tensor here; there are {len(leaves)} inputs")
        return _Plan([_layout(one, names) for one in buffers], arguments, len(self.entry.outputs))


def _layout(buffer: Buffer, names: dict[str, Any]) -> tuple[Sequence[int], Sequence[int] | None, torch.dtype]:
    if buffer.like:
        like = torch.empty_like(names[buffer.like], device="meta")
        return tuple(like.shape), like.stride(), like.dtype
    base, _, attribute = buffer.dtype.partition(".")
    dtype = names[base].dtype if attribute else getattr(torch, buffer.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise EntryError(f"{buffer.name}: {buffer.dtype!r} is no dtype of torch")
    return [int(value_of(size, names)) for size in buffer.shape], None, dtype


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
