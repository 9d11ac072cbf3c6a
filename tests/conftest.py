"""Skips tests marked `gpu(count)` on machines with fewer GPUs, with the reason that reports are read for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = {item: _gpus_wanted(marker) for item in items if (marker := item.get_closest_marker("gpu"))}
    if not wanted:
        return
    present = _gpu_count()
    for item, count in wanted.items():
        if present < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} GPU{'s' if count > 1 else ''}"))


def _gpus_wanted(marker: pytest.Mark) -> int:
    return int(marker.kwargs.get("count", marker.args[0] if marker.args else 1))


def _gpu_count() -> int:
    """By NVML, which makes no CUDA context in the test process."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
