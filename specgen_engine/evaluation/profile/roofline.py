"""Device peaks, the least time that a task can take, and what share of the peaks was reached. Pure functions.

Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .base import Bound, Roofline

FLOOR_MARGIN = 1.10
"""The floor assumes 10 % more bandwidth than the peak: memory clocks vary, and L2 write-back lags behind the timer."""
TIMER_NS = 1_500
"""A CUDA event resolves about 0.5 us; two of them, and a launch that overlaps the record before it."""
BUSY = 0.6
"""Below this share of both peaks a kernel is bound by latency (the threshold of Nsight Compute's SOL rule)."""

H100_FLOPS = {
    "fp64": 33.5e12, "fp64_tensor": 66.9e12, "fp32": 66.9e12, "fp16": 133.8e12, "tf32_tensor": 494.7e12,
    "bf16_tensor": 989.4e12, "fp16_tensor": 989.4e12, "fp8_tensor": 1978.9e12, "int8_tensor": 1978.9e12,
}  # fmt: skip
"""Dense, SXM: NVIDIA H100 Tensor Core GPU Architecture (whitepaper v1.04), table 2."""
DATASHEET: dict[str, tuple[float, dict[str, float]]] = {
    "H100 80GB HBM3": (3.352e12, H100_FLOPS),
    "H100 PCIe": (2.039e12, {name: value * 0.765 for name, value in H100_FLOPS.items()}),
    "H200": (4.8e12, H100_FLOPS),
    "A100-SXM4-80GB": (2.039e12, {"fp64": 9.7e12, "fp64_tensor": 19.5e12, "fp32": 19.5e12, "fp16": 78e12,
                                  "tf32_tensor": 156e12, "bf16_tensor": 312e12, "fp16_tensor": 312e12,
                                  "int8_tensor": 624e12}),
}  # fmt: skip
"""(bytes/s, dense flop/s by arithmetic) by a part of the device's name, from the vendor's data sheets."""


class DeviceFacts(NamedTuple):
    """What a device says of itself. memory_bytes_per_s: from its memory clock and bus width, 0 when it hides them;
    fp32_flops: multiprocessors x lanes x 2 x clock, 0 when unknown; l2_bytes: the last-level cache."""

    name: str
    l2_bytes: int = 0
    memory_bytes_per_s: float = 0.0
    fp32_flops: float = 0.0
    multiprocessors: int = 0
    max_warps: int = 64


class Peaks(NamedTuple):
    memory_bytes_per_s: float
    flops: Mapping[str, float]
    l2_bytes: int
    source: str


def peaks_of(facts: DeviceFacts, memory_gbs: float | None = None) -> Peaks:
    """The largest bandwidth that data sheet, device properties and operator know of; so the floor is never too high.

    memory_gbs: the operator's word, in GB/s, instead of both. 0 bytes/s: no peak is known.
    """
    sheet = next((known for part, known in DATASHEET.items() if part in facts.name), None)
    flops = dict(sheet[1]) if sheet else {"fp32": facts.fp32_flops} if facts.fp32_flops else {}
    if memory_gbs is not None:
        return Peaks(memory_gbs * 1e9, flops, facts.l2_bytes, "operator")
    claimed = facts.memory_bytes_per_s
    if sheet and sheet[0] >= claimed:
        return Peaks(sheet[0], flops, facts.l2_bytes, "data sheet")
    return Peaks(claimed, flops, facts.l2_bytes, "device properties" if claimed else "unknown")


class Work(NamedTuple):
    """What one call of a task's reference takes and gives, in bytes and operations.

    input_bytes: inputs and weights.  needed: those of inputs that the reference was seen to read throughout (weights
    count nothing: a candidate may have prepared them).
    flops: matrix products and 2-D convolutions only; 0 when there are none.
    """

    input_bytes: int
    output_bytes: int
    needed: int
    flops: int = 0
    flop_type: str = ""


def ideal_ms(work: Work, peaks: Peaks) -> float | None:
    """Inputs read once, outputs written once, at peak; None when no peak is known."""
    if not peaks.memory_bytes_per_s:
        return None
    return (work.input_bytes + work.output_bytes) / peaks.memory_bytes_per_s * 1e3


def floor_ms(work: Work, peaks: Peaks, cold: bool = True) -> float:
    """No call can take less: needed inputs come from memory, outputs may stay in the L2.

    cold: the L2 was flushed right before the call; else it may hold as much of the inputs. 0 when that says nothing:
    no peak is known, or all of it fits the L2.
    """
    if not peaks.memory_bytes_per_s:
        return 0.0
    if cold:
        moved = work.needed + max(0, work.output_bytes - peaks.l2_bytes)
    else:
        moved = max(0, work.needed + work.output_bytes - peaks.l2_bytes)
    return max(0.0, moved / (peaks.memory_bytes_per_s * FLOOR_MARGIN) * 1e3 - TIMER_NS / 1e6)


def below_floor(candidate_ms: float, work: Work, peaks: Peaks, cold: bool = True) -> str:
    """Why a time can't be true, "" when it can."""
    floor = floor_ms(work, peaks, cold)
    if candidate_ms >= floor:
        return ""
    read = work.needed / 1e6
    return (
        f"timed at {candidate_ms:.4f} ms, below the roofline floor of {floor:.4f} ms: {read:.1f} MB must be"
        f" read and {work.output_bytes / 1e6:.1f} MB written, at {peaks.memory_bytes_per_s / 1e9:.0f} GB/s"
        f" ({peaks.source})"
    )


def achieved(seconds: float, moved: float | None, flops: Mapping[str, float], peaks: Peaks, counted: str) -> Roofline:
    """Shares of the peaks. flops: by arithmetic; each takes its own time at peak, and the shares add up."""
    memory = compute = None
    if moved is not None and peaks.memory_bytes_per_s and seconds > 0:
        memory = moved / seconds / peaks.memory_bytes_per_s
    known = {name: count for name, count in flops.items() if count and peaks.flops.get(name)}
    if known and seconds > 0:
        compute = sum(count / peaks.flops[name] for name, count in known.items()) / seconds
    main = max(known, key=lambda name: known[name], default="")
    total = float(sum(flops.values())) if flops else None
    return Roofline(_rounded(memory), _rounded(compute), moved, total, main, counted, peaks.source)


def classify(memory: float | None, compute: float | None, busy: float = BUSY) -> Bound:
    """By shares of the peaks (0 to 1): the larger one when it is busy, else latency; unknown without figures."""
    if memory is None and compute is None:
        return Bound.UNKNOWN
    memory, compute = memory or 0.0, compute or 0.0
    if max(memory, compute) < busy:
        return Bound.LATENCY
    return Bound.MEMORY if memory >= compute else Bound.COMPUTE


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)
