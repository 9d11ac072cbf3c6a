"""Timing for bench.kv_transfer: device time by events, and a decode-like load to run beside the copies."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench.kv_methods import Move
from bench.kv_rig import Rig, Tables

BUDGET_US = 60_000.0
FEWEST, MOST, FEWEST_CALLS = 20, 100, 5
HEAD_START_CYCLES = 2_000_000  # about a millisecond
HEAD_START_PER_SAMPLE = 150_000  # the host enqueues a sample faster than this: the device never waits for it


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


class Timing(NamedTuple):
    """Microseconds of one transfer on the device."""

    p50: float
    p99: float
    samples: int


class Job(NamedTuple):
    """A method with the tables it rotates among."""

    move: Move
    tables: Sequence[Tables]
    device: int | None = None  # the GPU that issues it; None: the current one


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    return Timing(ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], len(ordered))


def measure(rig: Rig, jobs: Sequence[Job]) -> Timing:
    """Each sample runs all jobs at once (one: a one-way transfer; two: both ways) and ends when the last has."""
    clock = _events if rig.on_gpu else _wall
    clock(jobs, 3)
    first = clock(jobs, 3)
    samples = int(min(MOST, max(FEWEST, BUDGET_US / max(1.0, first[-1]))))
    return _summary(clock(jobs, samples))


def measure_calls(job: Job) -> Timing:
    """By the host's clock: from the call until the bytes have arrived, which `job.move` waits for."""
    first = _wall([job], 3)
    samples = int(min(MOST, max(FEWEST_CALLS, BUDGET_US / max(1.0, min(first)))))
    return _summary(_wall([job], samples))


def _side_stream(index: int, job: Job) -> torch.cuda.Stream:
    """The same streams each time: torch hands out 32 in turn, and two of a sample's must not be one."""
    device = torch.cuda.current_device() if job.device is None else job.device
    if (index, device) not in _streams:
        _streams[index, device] = torch.cuda.Stream(device=device)
    return _streams[index, device]


def _wall(jobs: Sequence[Job], samples: int) -> list[float]:
    times = []
    for sample in range(samples):
        start = time.perf_counter()
        for job in jobs:
            job.move(job.tables[sample % len(job.tables)], 0)
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _events(jobs: Sequence[Job], samples: int) -> list[float]:
    """Between two events of one stream lies what a job enqueues and nothing else: for our rows one kernel (tables read,
    bytes moved, tags settled), for a peer's its own kernels or copies. Enqueueing is done before the first starts."""
    main = torch.cuda.current_stream()
    sides = [_side_stream(i, job) for i, job in enumerate(jobs)] if len(jobs) > 1 else [main]
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    torch.cuda._sleep(HEAD_START_PER_SAMPLE * samples)
    for sample, (start, end) in enumerate(marks):
        start.record(main)
        for job, side in zip(jobs, sides, strict=True):
            if side is not main:
                side.wait_event(start)
            with torch.cuda.stream(side):
                job.move(job.tables[sample % len(job.tables)], side.cuda_stream)
        for side in sides:
            if side is not main:
                main.wait_stream(side)
        end.record(main)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in marks]


def kernel_floor_us() -> float:
    """Two events around a kernel that does nothing to speak of: what no kernel's row can be below."""
    word = torch.zeros(1, device="cuda")
    times = []
    for _ in range(3):
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(50)]
        torch.cuda._sleep(HEAD_START_PER_SAMPLE * len(marks))
        for start, end in marks:
            start.record()
            word.add_(1)
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) * 1e3 for start, end in marks]
    return _summary(times).p50


class DecodeLoad:
    """A decode step's memory traffic: the weight products of 8 layers of Qwen3-8B for 16 sequences, as a CUDA graph."""

    LAYERS, HIDDEN, BATCH = 8, 4096, 16
    WEIGHTS = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))

    def __init__(self, device: torch.device) -> None:
        make = {"dtype": torch.bfloat16, "device": device}
        self._weights = [[torch.randn(shape, **make) * 0.02 for shape in self.WEIGHTS] for _ in range(self.LAYERS)]
        self._x = torch.randn((self.BATCH, self.HIDDEN), **make)
        self._stream = torch.cuda.Stream(priority=-1)
        with torch.cuda.stream(self._stream):
            self._step()
            self._step()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._step()

    def _step(self) -> torch.Tensor:
        x = self._x
        for qkv, out, up, down in self._weights:
            x = (x @ qkv.T)[:, : self.HIDDEN] @ out.T
            x = (x @ up.T)[:, :12288] @ down.T
        return x

    def step_us(self, steps: int, beside: Callable[[], None] | None = None) -> float:
        """Median time of a step, with `beside` called once the steps are queued behind a common start."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(HEAD_START_CYCLES)
            marks[0].record()
            for mark in marks[1:]:
                self._graph.replay()
                mark.record()
        if beside is not None:
            beside()
        torch.cuda.synchronize()
        times = sorted(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks[2:]))
        return times[len(times) // 2]


def beside_decode(rig: Rig, job: Job, load: DecodeLoad, duty: float, steps: int = 60) -> tuple[float, float]:
    """(slowdown of a decode step, GB/s of the copies) while transfers run beside it for `duty` of the time.

    Slowdown is median step time with the copies over median without, less one; both in this call.
    """
    alone = load.step_us(steps)
    copy_us = measure(rig, [job]).p50
    copies = max(1, int(steps * alone * duty / copy_us))
    stream = torch.cuda.Stream(priority=0)
    gap_cycles = int(copy_us * (1 / duty - 1) * 1_500) if duty < 1 else 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            for index in range(copies):
                job.move(job.tables[index % len(job.tables)], stream.cuda_stream)
                if gap_cycles:
                    torch.cuda._sleep(gap_cycles)
            end.record()

    together = load.step_us(steps, run)
    bytes_moved = copies * len(job.tables[0]) * rig.shape.page_bytes
    return together / alone - 1, bytes_moved / (start.elapsed_time(end) * 1e6)
