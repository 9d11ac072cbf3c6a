"""Are two results the same? Tolerances by dtype, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .tensors import tensors_of

OUTLIER_SHARE = 1e-5
OUTLIER_FACTOR = 8.0
"""Reduced-precision sums in another order round a few elements in a million otherwise; none may be far off."""
_CHUNK = 1 << 24

TOLERANCE = {
    torch.float64: 1e-8,  # sums in another order; far above 2**-52 times any sensible length
    torch.float32: 1e-4,  # sums in another order and fast exp / rsqrt; below TF32's 2**-11
    torch.float16: 4e-3,  # 4 units of 2**-10: one rounding of each of a few fused steps
    torch.bfloat16: 2e-2,  # 2.5 units of 2**-7: the same for 8 bits of mantissa
}
LOW_PRECISION_TOLERANCE = 0.13  # one unit of e4m3's 2**-3


class Difference(NamedTuple):
    """What is wrong; kind is 'structure', 'shape', 'dtype', 'nan' or 'value'."""

    kind: str
    reason: str


def difference(actual: Any, expected: Any) -> Difference | None:
    """The first difference between two nests of tensors, or None.

    |a - e| <= tol * rms(e) + tol * |e|: the absolute part scales with the output, so that all zeros never pass for
    small values. Integers and booleans must be equal. NaN and infinity must be where the reference has them.
    """
    ours, theirs = tensors_of(actual), tensors_of(expected)
    if len(ours) != len(theirs) or _shape_of(actual) != _shape_of(expected):
        return Difference("structure", f"returns {_shape_of(actual)}, the reference {_shape_of(expected)}")
    for index, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        name = f"output {index}" if len(ours) > 1 else "the output"
        found = _tensor_difference(name, a, e)
        if found:
            return found
    return None


def largest_errors(actual: Any, expected: Any) -> dict[str, float]:
    """max_abs_error and max_rel_error over all floating-point outputs of equal shape; empty where there are none.

    Relative to |expected| + 1e-8, as FlashInfer-Bench has it. Not finite where a result is not.
    """
    worst: list[tuple[float, float]] = []
    for a, e in zip(tensors_of(actual), tensors_of(expected), strict=False):
        if a.shape != e.shape or not e.numel() or not (a.is_floating_point() and e.is_floating_point()):
            continue
        for start in range(0, e.numel(), _CHUNK):
            wide = torch.float64 if e.dtype == torch.float64 else torch.float32
            theirs = e.reshape(-1)[start : start + _CHUNK].to(wide)
            delta = (a.reshape(-1)[start : start + _CHUNK].to(wide) - theirs).abs_()
            worst.append((float(delta.max()), float(delta.div_(theirs.abs().add_(1e-8)).max())))
    if not worst:
        return {}
    return {"max_abs_error": _largest(pair[0] for pair in worst), "max_rel_error": _largest(pair[1] for pair in worst)}


def _largest(values: Iterable[float]) -> float:
    known = list(values)
    return math.nan if any(map(math.isnan, known)) else max(known)


def same_bits(a: Any, b: Any) -> bool:
    """Are all tensors of two nests equal bit by bit (so that NaN equals itself)?"""
    ours, theirs = tensors_of(a), tensors_of(b)
    return len(ours) == len(theirs) and all(map(_same_bits, ours, theirs))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.element_size() == 1:  # no arithmetic on float8 is needed
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else False


def _rms(e: torch.Tensor, wide: torch.dtype) -> float:
    """Root mean square of the finite elements."""
    square, count = 0.0, 0
    for start in range(0, e.numel(), _CHUNK):
        part = e[start : start + _CHUNK].to(wide)
        norm = float(torch.linalg.vector_norm(part))
        if not math.isfinite(norm):
            part = part[torch.isfinite(part)]
            norm = float(torch.linalg.vector_norm(part.to(torch.complex128 if part.is_complex() else torch.float64)))
        square += norm * norm
        count += part.numel()
    return (square / max(count, 1)) ** 0.5


def _shape_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_shape_of(item) for item in value)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shape_of(value[key])}" for key in sorted(value)) + "}"
    return repr(value)[:60]


def _tensor_difference(name: str, a: torch.Tensor, e: torch.Tensor) -> Difference | None:
    if a.shape != e.shape:
        return Difference("shape", f"{name} has shape {tuple(a.shape)}, the reference's {tuple(e.shape)}")
    if a.dtype != e.dtype:
        kinds = (str(a.dtype).removeprefix("torch."), str(e.dtype).removeprefix("torch."))
        return Difference("dtype", f"{name} has dtype {kinds[0]}, the reference's {kinds[1]}")
    if e.numel() == 0:
        return None
    if not (e.is_floating_point() or e.is_complex()):
        wrong = int((a != e).sum())
        return Difference("value", f"{name}: {wrong} of {e.numel()} elements differ") if wrong else None
    return _float_difference(name, a.reshape(-1), e.reshape(-1))


def _float_difference(name: str, a: torch.Tensor, e: torch.Tensor) -> Difference | None:
    tolerance = TOLERANCE.get(e.dtype, 1e-4 if e.is_complex() else LOW_PRECISION_TOLERANCE)
    low = e.dtype not in (torch.float32, torch.float64)
    wide = e.dtype if e.is_complex() else (torch.float64 if e.dtype == torch.float64 else torch.float32)
    rms = _rms(e, wide)
    wrong, worst, worst_allowed = 0, 0.0, 0.0
    for start in range(0, e.numel(), _CHUNK):
        ours, theirs = a[start : start + _CHUNK].to(wide), e[start : start + _CHUNK].to(wide)
        delta = (ours - theirs).abs()
        allowed = theirs.abs().mul_(tolerance).add_(tolerance * rms)
        within = delta <= allowed
        if bool(within.all()):
            continue
        bad = ~within
        same = (ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs))
        bad &= ~same
        if bool((bad & ~torch.isfinite(ours)).any()):
            return Difference("nan", f"{name} has NaN or infinity where the reference has none")
        if bool((bad & ~torch.isfinite(theirs)).any()):
            return Difference("nan", f"{name} has numbers where the reference has NaN or infinity")
        if bool(bad.any()):
            wrong += int(bad.sum())
            ratio, at = (delta / allowed).masked_fill_(~bad, 0).max(dim=0)
            if float(ratio) > worst_allowed:
                worst, worst_allowed = float(delta[at]), float(ratio)
    if wrong and not (low and wrong <= OUTLIER_SHARE * e.numel() and worst_allowed <= OUTLIER_FACTOR):
        share = 100.0 * wrong / e.numel()
        return Difference(
            "value",
            f"{name}: {share:.3g} % of the elements differ by more than {tolerance:g} of the reference's "
            f"(worst by {worst:.3g}, rms {rms:.3g})",
        )
    return None
