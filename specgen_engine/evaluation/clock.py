"""Timed calls on a CPU and on a CUDA device, one interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

_now = time.perf_counter_ns  # bound before any candidate's module is imported
L2_FLUSH_BYTES = 256 << 20


class Clock(Protocol):
    def settle(self) -> None:
        """Wait until everything that was started on the device has ended."""
        ...

    def time(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """(nanoseconds, result) of one call, from a quiet device to a quiet device."""
        ...


class CpuClock:
    def settle(self) -> None:
        pass

    def time(self, call: Callable[[], Any]) -> tuple[int, Any]:
        start = _now()
        result = call()
        return _now() - start, result


class CudaClock:
    """CUDA events around the call on the current stream, after the L2 has been overwritten."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        torch.cuda.set_device(self.device)
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._synchronize = torch.cuda.synchronize

    def settle(self) -> None:
        self._synchronize(self.device)

    def time(self, call: Callable[[], Any]) -> tuple[int, Any]:
        self._flush.zero_()
        self._synchronize(self.device)
        self._start.record()
        result = call()
        self._end.record()
        self._synchronize(self.device)
        return int(self._start.elapsed_time(self._end) * 1e6), result


def clock_for(device: str) -> Clock:
    return CudaClock(device) if device.startswith("cuda") else CpuClock()
