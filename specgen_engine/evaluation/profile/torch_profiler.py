"""torch.profiler: operators on a CPU, kernels on a GPU (through Kineto). Needs nothing but torch."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function  # torch.profiler's own core; that imports Dynamo, 4 s

from .base import Kernel, Metric, ProfileError, Tool
from .launches import MAX_KERNELS, NAME_CHARS, Call, Launch, call_of, median_call, plain_call

CALLS = 5
MARK = "specgen.call"
L2_FLUSH_BYTES = 256 << 20


def profile_call(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """The median of CALLS calls; in the candidate's own process. Raises ProfileError when nothing was recorded."""
    return _on_gpu(call, device) if device.startswith("cuda") else _on_cpu(call)


def _on_cpu(call: Callable[[], Any]) -> dict[str, Any]:
    with profile(with_flops=True, acc_events=True) as recorded:
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        spent = time.perf_counter_ns() - began
    rows = [row for row in recorded.key_averages() if not row.key.startswith(("ProfilerStep", "[memory]"))]
    kernels = [
        Kernel(row.key[:NAME_CHARS], max(1, row.count // CALLS), row.self_cpu_time_total * 1e3 / CALLS) for row in rows
    ]
    kernels = sorted(kernels, key=lambda kernel: -kernel.time_ns)[:MAX_KERNELS]
    inside = sum(kernel.time_ns for kernel in kernels)
    flops = sum(row.flops or 0 for row in rows) / CALLS
    extra = [
        Metric("torch_operators", float(sum(kernel.launches for kernel in kernels)), "calls"),
        Metric("torch_operator_time", inside, "ns"),
        Metric("torch_operator_flops", float(flops), "flop"),
    ]
    return plain_call(Tool.TORCH, Call(spent / CALLS, inside, tuple(kernels)), extra)


def _on_gpu(call: Callable[[], Any], device: str) -> dict[str, Any]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    with profile(use_device="cuda", use_kineto=True, acc_events=True) as recorded:
        for _ in range(CALLS):
            flush.zero_()
            torch.cuda.synchronize(device)
            with record_function(MARK):
                call()
                torch.cuda.synchronize(device)
    handle, name = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    recorded.export_chrome_trace(name)
    trace = json.loads(Path(name).read_text())
    os.unlink(name)
    return plain_call(Tool.TORCH, median_call(calls_in(trace)))


def calls_in(trace: Mapping[str, Any]) -> list[Call]:
    """The marked calls of a Kineto trace (Chrome's format, microseconds). Raises ProfileError when none has a kernel.

    A call ends with a synchronization inside its mark, so a kernel belongs to the mark that it starts in.
    """
    events = trace["traceEvents"]
    marks = [event for event in events if event.get("name") == MARK and event.get("cat") == "user_annotation"]
    kernels = [_launch(event) for event in events if event.get("cat") == "kernel"]
    found = []
    for mark in marks:
        start, end = mark["ts"] * 1e3, (mark["ts"] + mark["dur"]) * 1e3
        inside = [launch for launch in kernels if start <= launch.start < end]
        if inside:
            found.append(call_of(inside))
    if not found:
        raise ProfileError("torch.profiler recorded no kernel; is CUPTI in use by another tool?")
    return found


def _launch(event: Mapping[str, Any]) -> Launch:
    said = event.get("args", {})
    occupancy = said.get("est. achieved occupancy %")
    grid, block = (said.get(key) for key in ("grid", "block"))
    return Launch(
        event["name"],
        event["ts"] * 1e3,
        (event["ts"] + event["dur"]) * 1e3,
        (grid[0], grid[1], grid[2]) if grid else None,
        (block[0], block[1], block[2]) if block else None,
        said.get("registers per thread"),
        said.get("shared memory"),
        occupancy / 100 if occupancy else None,  # 0 where Kineto does not know the block's shared memory to fit
    )
