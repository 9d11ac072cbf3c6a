"""Kernel records by CUPTI's activity API (cupti-python): times, registers, shared memory, grid and block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import ProfileError, Tool
from .launches import Launch, call_of, median_call, plain_call
from .occupancy import SmLimits, theoretical

CALLS = 5
BUFFER_BYTES = 8 << 20
FLUSH_FORCED = 1
L2_FLUSH_BYTES = 256 << 20


def profile_call(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """The median of CALLS calls, each with a cold L2. In the candidate's own process.

    Raises ProfileError when CUPTI can't be used: no package, no GPU, or another tool has it.
    """
    try:
        from cupti import cupti
    except (ImportError, OSError, RuntimeError) as error:
        raise ProfileError(f"CUPTI: {error}; install cupti-python for this CUDA version") from error
    launches: list[Launch] = []
    limits = _limits(device)

    def requested() -> tuple[int, int]:
        return BUFFER_BYTES, 0

    def completed(records: list[Any]) -> None:
        launches.extend(_launch(record, limits) for record in records if hasattr(record, "registers_per_thread"))

    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    kind = cupti.ActivityKind.CONCURRENT_KERNEL
    calls = []
    try:
        cupti.activity_register_callbacks(requested, completed)
        for _ in range(CALLS):
            flush.zero_()
            torch.cuda.synchronize(device)
            launches.clear()
            cupti.activity_enable(kind)
            call()
            torch.cuda.synchronize(device)
            cupti.activity_flush_all(FLUSH_FORCED)
            cupti.activity_disable(kind)
            calls.append(call_of(launches))
    except cupti.cuptiError as error:
        raise ProfileError(f"CUPTI: {error}") from error
    return plain_call(Tool.CUPTI, median_call(calls))


def _launch(record: Any, limits: SmLimits) -> Launch:
    block = (record.block_x, record.block_y, record.block_z)
    shared = record.static_shared_memory + record.dynamic_shared_memory
    threads = block[0] * block[1] * block[2]
    try:
        occupancy = theoretical(threads, record.registers_per_thread, shared, limits).share
    except ValueError:
        occupancy = None
    grid = (record.grid_x, record.grid_y, record.grid_z)
    return Launch(
        torch._C._demangle(record.name),
        record.start,
        record.end,
        grid,
        block,
        record.registers_per_thread,
        shared,
        occupancy,
    )


def _limits(device: str) -> SmLimits:
    said: Any = torch.cuda.get_device_properties(device)
    return SmLimits(
        warps=said.max_threads_per_multi_processor // said.warp_size,
        registers=said.regs_per_multiprocessor,
        shared_bytes=said.shared_memory_per_multiprocessor,
    )
