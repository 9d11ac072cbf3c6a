"""Signs of cheating that are looked for in the candidate's own process: replaced functions, L2 cache set aside.

Code there can remove a tripwire; the supervisor's clock and the judge's comparison stand outside and don't need them.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any, NamedTuple

import torch

from . import clock, modules, tensors
from .gpumemory import driver_call
from .guards import Guard

_PERSISTING_L2 = 0x06  # CU_LIMIT_PERSISTING_L2_CACHE_SIZE


class Cheat(Exception):
    """A tripwire was touched; one line."""


class _Watched(NamedTuple):
    label: str
    owner: Any
    name: str
    original: Any


def _watch(label: str, owner: Any, *names: str) -> list[_Watched]:
    return [_Watched(f"{label}.{name}", owner, name, getattr(owner, name)) for name in names]


_WATCHED = (  # as they are before a candidate is imported
    *_watch("torch.cuda.Event", torch.cuda.Event, "record", "query", "elapsed_time", "synchronize"),
    *_watch("torch.cuda", torch.cuda, "synchronize", "current_stream", "Event", "_sleep"),
    *_watch("time", time, "perf_counter_ns", "process_time_ns", "monotonic"),
    *_watch("CpuClock", clock.CpuClock, "time", "settle", "lead"),
    *_watch("CudaClock", clock.CudaClock, "time", "settle", "lead"),
    *_watch("TimedCalls", modules.TimedCalls, "run", "move"),
    *_watch("tensors", tensors, "read_values", "write_values"),
    *_watch("torch.Tensor", torch.Tensor, "copy_", "clone", "data_ptr", "untyped_storage"),
)


def check_functions(guards_off: frozenset[Guard]) -> None:
    """Raises Cheat naming the first function of torch, time or the harness that the candidate replaced."""
    if Guard.PATCHES in guards_off:
        return
    for watched in _WATCHED:
        if getattr(watched.owner, watched.name, None) is not watched.original:
            raise Cheat(f"it replaces {watched.label}")


def check_l2(guards_off: frozenset[Guard]) -> None:
    """Raises Cheat when part of the L2 was set aside, since release_l2, for data that stay whatever is flushed."""
    if Guard.L2 in guards_off:
        return
    kept = ctypes.c_size_t()
    driver_call("cuCtxGetLimit", ctypes.byref(kept), ctypes.c_int(_PERSISTING_L2))
    if kept.value:
        raise Cheat(f"it sets {kept.value} bytes of the L2 cache aside, where data outlast the flush before a call")


def release_l2(guards_off: frozenset[Guard]) -> None:
    """Nothing is set aside any more (by default 11 MiB are, on an H200), and marked lines become ordinary ones."""
    if Guard.L2 not in guards_off:
        driver_call("cuCtxSetLimit", ctypes.c_int(_PERSISTING_L2), ctypes.c_size_t(0))
        driver_call("cuCtxResetPersistingL2Cache")
