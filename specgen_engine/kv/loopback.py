"""The transport over shared memory between two processes, for machines without a GPU: all real but the copy."""

from __future__ import annotations

import os

from specgen_engine.kv.native import _kv


class LoopbackChunk:
    """A sealed memfd."""

    def __init__(self, chunk_bytes: int) -> None:
        self._fd = _kv.create_loopback_chunk(chunk_bytes)

    def export_fd(self) -> int:
        if self._fd < 0:
            raise ValueError("the chunk was released: it has no descriptor to export")
        return os.dup(self._fd)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.release()


class LoopbackBackend:
    """Shared memory. `page_delay_us` slows each page's copy, so that tests can catch copies in flight."""

    name = "loopback"

    def __init__(self, page_delay_us: int = 0) -> None:
        self.page_delay_us = page_delay_us

    def chunk(self, chunk_bytes: int) -> LoopbackChunk:
        return LoopbackChunk(chunk_bytes)

    def space(self, slots: int, chunk_bytes: int) -> _kv.LoopbackSpace:
        return _kv.LoopbackSpace(slots, chunk_bytes)

    def copier(self, layout: _kv.PageLayout, base: int) -> _kv.LoopbackCopier:
        return _kv.LoopbackCopier(layout, base, self.page_delay_us)
