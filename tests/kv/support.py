"""Small arenas over shared memory for tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.borrower import Link
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv

CHUNK_BYTES = 1 << 14
PAGE_BYTES = 1024


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def settles(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether a condition that other threads bring about holds within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Side:
    """A borrower: host buffers that stand for a GPU's KV pool, and an arena."""

    def __init__(
        self, name: str, slots: int = 8, pages: int = 64, delay_us: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.name = name
        self.buffers = [np.zeros((pages, PAGE_BYTES // 4), np.uint8) for _ in range(4)]
        planes = [_kv.Plane(buffer.ctypes.data, buffer.strides[0], buffer.shape[1]) for buffer in self.buffers]
        self.arena = PageArena(LoopbackBackend(delay_us), planes, _kv.ArenaLayout.PAGE_FIRST, slots, chunk_bytes)

    def connect(self, lender: Lender | Path, timeout_s: float = 5.0) -> Link:
        path = lender.path if isinstance(lender, Lender) else lender
        return Link(self.arena, path, self.name, timeout_s)

    def fill(self, device_pages: object, value: int) -> None:
        for index, buffer in enumerate(self.buffers):
            buffer[device_pages] = (value + index) % 256

    def holds(self, device_pages: object, value: int) -> bool:
        return all(bool((buffer[device_pages] == (value + i) % 256).all()) for i, buffer in enumerate(self.buffers))


def make_lender(directory: Path, name: str = "lender", chunks: int = 6, **options: object) -> Lender:
    return Lender(directory / "s", name, LoopbackBackend(), CHUNK_BYTES, chunks, **options)  # type: ignore[arg-type]
