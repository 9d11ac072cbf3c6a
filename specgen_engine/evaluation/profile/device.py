"""What a device says of itself, and its peaks as measured. Called only in processes that may touch the device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .roofline import DeviceFacts

_FP32_LANES = {7: 64, 8: 128, 9: 128, 10: 128, 12: 128}
_COPY_BYTES, _MATRIX = 1 << 30, 8192
_REPEATS = 10


def device_facts(device: str) -> DeviceFacts:
    """From CUDA's device properties; of a CPU the last-level cache, no peaks."""
    if not device.startswith("cuda"):
        return DeviceFacts("cpu", l2_bytes=_last_level_cache())
    said: Any = torch.cuda.get_device_properties(device)
    clock, memory_clock = getattr(said, "clock_rate", 0), getattr(said, "memory_clock_rate", 0)  # kHz
    bus = getattr(said, "memory_bus_width", 0)  # bits
    return DeviceFacts(
        name=said.name,
        l2_bytes=said.L2_cache_size,
        memory_bytes_per_s=2.0 * memory_clock * 1e3 * bus / 8,  # two transfers a clock
        fp32_flops=2.0 * said.multi_processor_count * _FP32_LANES.get(said.major, 64) * clock * 1e3,
        multiprocessors=said.multi_processor_count,
        max_warps=said.max_threads_per_multi_processor // said.warp_size,
    )


def measured_peaks(device: str) -> dict[str, float]:
    """Bytes/s of a copy (read and written) and flop/s of a bf16 matrix product, the best of ten runs each."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=device)
    right = torch.randn_like(left)
    copy_s = _best_s(lambda: target.copy_(source))
    product_s = _best_s(lambda: left @ right)
    return {"copy_bytes_per_s": 2 * _COPY_BYTES / copy_s, "bf16_flops": 2 * _MATRIX**3 / product_s}


def _best_s(call: Any) -> float:
    times = []
    for _ in range(_REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times[2:])


def _last_level_cache() -> int:
    for index in (3, 2):
        try:
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text().strip()
            return int(text.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
