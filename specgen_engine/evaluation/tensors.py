"""Arguments and results of a model in shared memory: raw bytes in a memfd, and a JSON layout that describes them."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import torch

ALIGN = 64
REGION_BYTES = 1 << 40
"""Size of a region's file: sparse, so only what is written takes memory."""
_SEALS = 0x0002 | 0x0004  # F_SEAL_SHRINK | F_SEAL_GROW: no process can make another's mapping fault
_ADD_SEALS = 1033
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


class LayoutError(ValueError):
    """A value that can't be laid out, or a layout that doesn't describe values inside its region."""


def create_region(name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, REGION_BYTES)
    fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
    return fd


def write_values(fd: int, value: Any, offset: int = 0) -> tuple[Any, int]:
    """Write a nest of tensors and plain values from a page-aligned offset on; returns (layout, next free offset).

    Raises LayoutError for values other than tensors, lists, tuples, dicts with string keys, numbers, strings, None.
    """
    tensors: list[tuple[torch.Tensor, int]] = []
    end = offset

    def plan(item: Any) -> Any:
        nonlocal end
        if isinstance(item, torch.Tensor):
            start = -(-end // ALIGN) * ALIGN
            end = start + item.numel() * item.element_size()
            tensors.append((item, start))
            return {"t": [str(item.dtype).removeprefix("torch."), list(item.shape), _strides(item), start]}
        if isinstance(item, (list, tuple)):
            return {"l" if isinstance(item, list) else "u": [plan(part) for part in item]}
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            return {"d": {key: plan(part) for key, part in item.items()}}
        if item is None or isinstance(item, (bool, int, float, str)):
            return {"v": item}
        if isinstance(item, torch.dtype):
            return {"dtype": str(item).removeprefix("torch.")}
        raise LayoutError(f"a {type(item).__name__} is no tensor, list, tuple, dict, number or string")

    layout = plan(value)
    if end > offset:
        with _mapped(fd, offset, end - offset) as memory:
            for tensor, start in tensors:
                _view(memory, tensor.dtype, list(tensor.shape), _strides(tensor), start - offset).copy_(tensor.detach())
    return layout, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def read_values(fd: int, layout: Any, device: str = "cpu") -> Any:
    """Fresh private copies of the values of a layout. Raises LayoutError when it is malformed."""
    try:
        return _read(fd, layout, device)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, OSError) as error:
        raise LayoutError(f"malformed layout: {error}") from error


def _read(fd: int, layout: Any, device: str) -> Any:
    ((kind, body),) = layout.items()
    if kind == "v":
        return body
    if kind == "dtype":
        return _DTYPES[body]
    if kind in ("l", "u"):
        parts = [_read(fd, part, device) for part in body]
        return parts if kind == "l" else tuple(parts)
    if kind == "d":
        return {key: _read(fd, part, device) for key, part in body.items()}
    name, shape, strides, start = body
    dtype = _DTYPES[name]
    extent = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if start < 0 or start + extent * dtype.itemsize > REGION_BYTES or min([*shape, *strides, 0]) < 0:
        raise LayoutError("tensor outside its region")
    if extent == 0:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    page = start // mmap.PAGESIZE * mmap.PAGESIZE
    with _mapped(fd, page, start - page + extent * dtype.itemsize) as memory:
        view = _view(memory, dtype, shape, strides, start - page)
        copy = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        copy.copy_(view)
        return copy


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Every tensor of a nest, depth first."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def map_tensors(value: Any, function: Any) -> Any:
    """The same nest with function applied to every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def _strides(tensor: torch.Tensor) -> list[int]:
    """The tensor's own strides where its elements fill a block without gaps or overlaps, else contiguous ones."""
    if tensor.numel() and _span(tensor) == tensor.numel() and 0 not in tensor.stride():
        return list(tensor.stride())
    return list(torch.empty(tensor.shape, device="meta").stride())


def _span(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class _mapped:
    def __init__(self, fd: int, offset: int, length: int) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self.map = mmap.mmap(fd, length, mmap.MAP_SHARED, access, offset=offset)

    def __enter__(self) -> mmap.mmap:
        return self.map

    def __exit__(self, *_: object) -> None:
        try:
            self.map.close()
        except BufferError:  # a tensor that still views it is collected with it
            pass


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: list[int], strides: list[int], offset: int) -> torch.Tensor:
    extent = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if extent == 0:
        return torch.empty_strided(shape, strides, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=dtype, count=extent, offset=offset)
    return flat.as_strided(shape, strides)
