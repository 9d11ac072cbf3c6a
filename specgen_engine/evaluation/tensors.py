"""Arguments and results of a model in shared memory: raw bytes, and a JSON layout that describes them.

A region is a memfd on the host or a GpuRegion on a device.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .gpumemory import GpuRegion

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


class RegionFull(LayoutError):
    """The values need more bytes than the region has."""


def create_region(name: str) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, REGION_BYTES)
    fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
    return fd


def write_values(region: int | GpuRegion, value: Any, offset: int = 0) -> tuple[Any, int]:
    """Write a nest of tensors and plain values from a page-aligned offset on; returns (layout, next free offset).

    Raises LayoutError for values other than tensors, lists, tuples, dicts with string keys, numbers, strings, None;
    RegionFull when they don't fit.
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
    if end > _size(region):
        raise RegionFull(f"{end} bytes; the region has {_size(region)}")
    if end > offset:
        with _window(region, offset, end - offset) as memory:
            for tensor, start in tensors:
                _view(memory, tensor.dtype, list(tensor.shape), _strides(tensor), start - offset).copy_(tensor.detach())
        if not isinstance(region, int):
            torch.cuda.synchronize()  # another process reads it once it is told
    return layout, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def read_values(region: int | GpuRegion, layout: Any, device: str = "cpu") -> Any:
    """Fresh private copies of the values of a layout. Raises LayoutError when it is malformed."""
    try:
        return _read(region, layout, device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # the device's fault, not the layout's
        raise
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError, OSError) as error:
        raise LayoutError(f"malformed layout: {error}") from error


def _read(region: int | GpuRegion, layout: Any, device: str) -> Any:
    ((kind, body),) = layout.items()
    if kind == "v":
        return body
    if kind == "dtype":
        return _DTYPES[body]
    if kind in ("l", "u"):
        parts = [_read(region, part, device) for part in body]
        return parts if kind == "l" else tuple(parts)
    if kind == "d":
        return {key: _read(region, part, device) for key, part in body.items()}
    name, shape, strides, start = body
    dtype = _DTYPES[name]
    extent = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if start < 0 or start + extent * dtype.itemsize > _size(region) or min([*shape, *strides, 0]) < 0:
        raise LayoutError("tensor outside its region")
    if extent == 0:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    page = start // mmap.PAGESIZE * mmap.PAGESIZE
    with _window(region, page, start - page + extent * dtype.itemsize) as memory:
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


def _size(region: int | GpuRegion) -> int:
    return REGION_BYTES if isinstance(region, int) else region.size


@contextmanager
def _window(region: int | GpuRegion, offset: int, length: int) -> Iterator[torch.Tensor]:
    """Bytes of a region as a uint8 tensor."""
    if not isinstance(region, int):
        yield region.bytes[offset : offset + length]
        return
    mapped = mmap.mmap(region, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
    yield torch.frombuffer(mapped, dtype=torch.uint8)  # the map is closed when the last view of it is collected


def _view(memory: torch.Tensor, dtype: torch.dtype, shape: list[int], strides: list[int], offset: int) -> torch.Tensor:
    extent = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if extent == 0:
        return torch.empty_strided(shape, strides, dtype=dtype)
    return memory[offset : offset + extent * dtype.itemsize].view(dtype).as_strided(shape, strides)
