"""What a FlashInfer Trace definition (its JSON object) says of inputs and outputs, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_INTEGER_RANGES = {"int8": (-128, 128), "int16": (-1024, 1024), "int32": (-1024, 1024), "int64": (-1024, 1024)}
_FLOATS = ("float32", "float16", "bfloat16")
_SMALL_FLOATS = ("float8_e4m3fn", "float8_e5m2")


def torch_dtype(name: str) -> torch.dtype:
    """Raises ValueError naming a dtype that this torch lacks, or that takes half a byte (no tensor is made of it)."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} is not supported")
    return dtype


def axes_of(definition: dict[str, Any], inputs: Sequence[Any]) -> dict[str, int]:
    """Every axis's size, the variable ones from the inputs' shapes. Raises ValueError where they disagree."""
    sizes = {name: int(axis["value"]) for name, axis in definition["axes"].items() if axis.get("type") == "const"}
    for (name, spec), value in zip(definition["inputs"].items(), inputs, strict=True):
        if spec["shape"] is None or not isinstance(value, torch.Tensor):
            continue
        if len(spec["shape"]) != value.dim():
            raise ValueError(f"input {name} has {value.dim()} axes, the definition {len(spec['shape'])}")
        for axis, size in zip(spec["shape"], value.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"axis {axis} is {sizes[axis]} and, in input {name}, {size}")
    return sizes


def make_outputs(definition: dict[str, Any], inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Uninitialised tensors for the outputs, on the device of the first tensor among the inputs."""
    sizes = axes_of(definition, inputs)
    device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), torch.device("cpu"))
    return [
        torch.empty([sizes[axis] for axis in spec["shape"] or ()], dtype=torch_dtype(spec["dtype"]), device=device)
        for spec in definition["outputs"].values()
    ]


def as_results(definition: dict[str, Any], result: Any, inputs: Sequence[Any]) -> Any:
    """A function's result as one tensor, or a tuple of them in the definition's order. Raises ValueError."""
    outputs = definition["outputs"]
    if isinstance(result, dict):
        missing = [name for name in outputs if name not in result]
        if missing:
            raise ValueError(f"the result lacks the output {missing[0]!r}")
        result = [result[name] for name in outputs]
    values = list(result) if isinstance(result, (tuple, list)) else [result]
    if len(values) != len(outputs):
        raise ValueError(f"{len(values)} results, the definition has {len(outputs)} outputs")
    device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), torch.device("cpu"))
    tensors = [
        value
        if isinstance(value, torch.Tensor)
        else torch.tensor(value, dtype=torch_dtype(spec["dtype"]), device=device)
        for value, spec in zip(values, outputs.values(), strict=True)
    ]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def random_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Normal for floats (8-bit ones within 2), bits for bool, FlashInfer-Bench's ranges for integers."""
    dtype = torch_dtype(name)
    if name in _FLOATS:
        return torch.randn(list(shape), dtype=dtype)
    if name in _SMALL_FLOATS:
        return torch.randn(list(shape)).clamp_(-2.0, 2.0).to(dtype)
    if name == "bool":
        return torch.randint(0, 2, list(shape), dtype=torch.bool)
    if name in _INTEGER_RANGES:
        low, high = _INTEGER_RANGES[name]
        return torch.randint(low, high, list(shape), dtype=dtype)
    raise ValueError(f"no random inputs of dtype {name!r} are made here")
