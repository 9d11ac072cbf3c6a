"""What one call of a task's reference takes and gives. Runs in the judge's process; a candidate never sees it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

from ..tensors import map_tensors, tensors_of
from .roofline import Work

POKES = 8
"""Elements of a tensor that must each reach the result: one read to less than two thirds passes once in 25."""
SMALL_BYTES = 1 << 20
_PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "conv2d"))
_TENSOR_CORE = {
    torch.float16: "fp16_tensor", torch.bfloat16: "bf16_tensor", torch.float8_e4m3fn: "fp8_tensor",
    torch.float8_e5m2: "fp8_tensor", torch.float64: "fp64_tensor", torch.int8: "int8_tensor",
}  # fmt: skip


def work_of(
    model: Any,
    inputs: list[Any],
    expected: Any,
    aliases: bool,
    *,
    needed: bool,
    flops: bool,
    cache: dict[str, int] | None = None,
) -> Work:
    """needed: find out which inputs matter (POKES calls of the reference a tensor); else all are taken to.

    flops: count matrix products and 2-D convolutions in one call under torch's profiler. float32 products are taken
    for TF32, which has the higher peak. aliases: the results lie in an input's memory, so nothing is written.
    cache: keeps what those calls found, for the same model and shapes.
    """
    read = sum(stored_bytes(tensor) for tensor in tensors_of(inputs))
    state = tensors_of(dict(model.state_dict())) if isinstance(model, torch.nn.Module) else []
    weights = sum(stored_bytes(tensor) for tensor in state)
    written = 0 if aliases else sum(stored_bytes(tensor) for tensor in tensors_of(expected))
    cache = {} if cache is None else cache
    if needed and "needed" not in cache:
        cache["needed"] = needed_bytes(model, inputs, expected)
    if flops and "flops" not in cache:
        cache["flops"] = _count_flops(model, inputs)
    matter, count = cache["needed"] if needed else read, cache["flops"] if flops else 0
    kinds = [tensor.dtype for tensor in tensors_of(inputs) if tensor.numel() > 1]
    kind = next((_TENSOR_CORE[dtype] for dtype in kinds if dtype in _TENSOR_CORE), "tf32_tensor")
    return Work(read + weights, written, matter, count, kind if count else "")


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded one has fewer than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def needed_bytes(model: Any, inputs: list[Any], expected: Any) -> int:
    """Bytes of the floating-point inputs of which each of POKES random elements, made NaN, changes the result.

    Others count nothing: an embedding's rows that no index names need not be read. Integers are left alone, since a
    changed index may reach outside its tensor.
    """
    flat = tensors_of(inputs)
    total = 0
    for position, tensor in enumerate(flat):
        large = tensor.is_floating_point() and stored_bytes(tensor) >= SMALL_BYTES
        if large and all(_matters(model, inputs, position, expected) for _ in range(POKES)):
            total += stored_bytes(tensor)
    return total


def _matters(model: Any, inputs: list[Any], position: int, expected: Any) -> bool:
    given = map_tensors(inputs, torch.clone)
    target = tensors_of(given)[position]
    at = tuple(random.randrange(size) for size in target.shape)
    target[at] = float("nan")
    try:
        changed = model(*given)
    except Exception:  # a reference that checks its inputs: it can't be told, so nothing is claimed
        return False
    pairs = zip(tensors_of(changed), tensors_of(expected), strict=True)
    return any(not torch.equal(new, old) for new, old in pairs)


def _count_flops(model: Callable[..., Any], inputs: list[Any]) -> int:
    """By the shapes that torch.profiler sees; FlopCounterMode counts more, and takes seconds to import."""
    given = map_tensors(inputs, torch.clone)
    with profile(with_flops=True, acc_events=True) as seen:
        model(*given)
    return int(sum(row.flops or 0 for row in seen.key_averages() if row.key in _PRODUCTS))
