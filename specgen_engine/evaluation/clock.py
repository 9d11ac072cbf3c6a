"""Timed calls on a CPU and on a CUDA device, one interface."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

_wall = time.perf_counter_ns  # bound before any candidate's module is imported
_cpu = time.process_time_ns
L2_FLUSH_BYTES = 256 << 20
EXTRA_CALLS = 12
HEAD_START_CYCLES = 800_000
"""About 0.4 ms of an idle GPU, in which the host launches what is timed."""


class Clock(Protocol):
    def settle(self) -> None:
        """Wait until everything that was started on the device has ended."""
        ...

    def lead(self) -> None:
        """Once the device is quiet, let it wait, so that the host is ahead of it from here to the end of time()."""
        ...

    def time(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """(nanoseconds, result) of one call, to a quiet device."""
        ...

    def take_behind(self) -> int:
        """Calls since the last time that the device began before the host had launched all of them."""
        ...

    def take_late(self) -> list[int]:
        """Of each call since the last time: nanoseconds that the device went on after the timed stream was done."""
        ...


class CpuClock:
    """CPU time of the whole process with one thread, wall time with more.

    With one thread the two agree on an idle machine (but for sleeping, which gains nothing); beside a busy engine
    wall time measures the neighbours: the same kernel gave 0.8x and 4.9x on two shared cores.
    """

    def __init__(self, threads: int) -> None:
        self._now = _cpu if threads == 1 else _wall

    def settle(self) -> None:
        pass

    def take_late(self) -> list[int]:
        return []

    def take_behind(self) -> int:
        return 0

    def lead(self) -> None:
        pass

    def time(self, call: Callable[[], Any]) -> tuple[int, Any]:
        now = self._now
        start = now()
        result = call()
        return now() - start, result


class CudaClock:
    """CUDA events around the call on the current stream, after the L2 has been overwritten.

    After lead() the host has launched the whole call when it begins: beside other evaluations a launch from Python
    outlasts the flush, and the same kernel took 0.28 or 0.37 ms. Inputs are replaced between the two, in the stream's
    order: what another stream does while the device waits is done to the former inputs.
    The device is waited for once that stream is done: what others still work on then is late (take_late).
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        torch.cuda.set_device(self.device)
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._synchronize = torch.cuda.synchronize
        self._late: list[int] = []
        self._behind = 0
        self._sleep = torch.cuda._sleep

    def settle(self) -> None:
        self._synchronize(self.device)

    def take_behind(self) -> int:
        behind, self._behind = self._behind, 0
        return behind

    def take_late(self) -> list[int]:
        late, self._late = self._late, []
        return late

    def lead(self) -> None:
        self._synchronize(self.device)
        self._sleep(HEAD_START_CYCLES)

    def time(self, call: Callable[[], Any]) -> tuple[int, Any]:
        self._flush.zero_()
        self._start.record()
        result = call()
        self._end.record()
        self._behind += self._start.query()
        self._end.synchronize()
        joined = _wall()
        self._synchronize(self.device)
        self._late.append(_wall() - joined)
        return int(self._start.elapsed_time(self._end) * 1e6), result


def warm_times(device: str, call: Callable[[], Any]) -> list[int]:
    """Nanoseconds of calls whose inputs the call before left in the L2 cache; CUDA only."""
    times = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    for _ in range(EXTRA_CALLS):
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(int(start.elapsed_time(end) * 1e6))
    return times


def graph_times(device: str, call: Callable[[], Any]) -> tuple[list[int], Any]:
    """(nanoseconds, last result) of replays of call captured as a CUDA graph, with a cold L2.

    Raises what the call raises when it can't be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    clock = CudaClock(device)
    times = [clock.time(graph.replay)[0] for _ in range(EXTRA_CALLS)]
    return times, result


def clock_for(device: str) -> Clock:
    return CudaClock(device) if device.startswith("cuda") else CpuClock(torch.get_num_threads())


def supervisor_clock(device: str, threads: int, pid: int) -> Callable[[], int]:
    """Nanoseconds as the supervisor sees them: another process's CPU time where that is what is measured, else wall."""
    if device.startswith("cuda") or threads != 1:
        return _wall
    clock = (~pid << 3) | 2  # clock_getcpuclockid(3)

    def read() -> int:
        try:
            return time.clock_gettime_ns(clock)
        except OSError:  # it has ended; its reply will not come either
            return 0

    return read


def waited_for_cpu(pid: int) -> int | None:
    """Nanoseconds that a process's main thread has wanted a CPU and had none; None where the kernel doesn't count."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
