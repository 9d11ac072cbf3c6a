"""Tags of pages as they stand in the lenders' memory, read a chunk at a time and kept until `forget`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specgen_engine.kv.base import PageRefs
from specgen_engine.kv.native import _kv

if TYPE_CHECKING:
    from specgen_engine.kv.arena import PageArena

FIRST_BYTES = 4 << 20
MOST_AHEAD = 256


class Places(NamedTuple):
    """Where pages lie. `of`: the slot of each; `slots`: those slots, ascending."""

    of: NDArray[np.int64]
    slots: NDArray[np.int64]


def places(arena: PageArena, refs: PageRefs) -> Places:
    """Without sorting the pages, which may be tens of thousands while a request waits."""
    of = refs.pages // arena.layout.pages_per_chunk
    return Places(of, np.flatnonzero(np.bincount(of)))


class TagReader:
    """Tag tables of an arena's chunks, as they were when last read since `forget`.

    A read waits for the memory it reads, however little that is. Restores that are admitted together would each wait:
    so every read takes as many of the chunks that follow as were read before it, which are likely to be asked for next.
    Thread-safe by the arena's own lock, which also keeps chunks mapped that are read ahead.
    """

    def __init__(self, arena: PageArena) -> None:
        self._arena = arena
        self._row = np.full(arena.slots, -1, np.int64)  # of a slot's table
        self._shift = np.zeros(arena.slots, np.int64)  # from a page's number to its place among the tables
        self._tables = np.empty((0, arena.layout.pages_per_chunk), np.uint64)
        self._used = 0
        self._pinned: Any = None
        self._stream: Any = None
        self.reads = 0

    def forget(self) -> None:
        """What was read may have changed: a scheduler's step has begun."""
        if self._used:
            with self._arena._changed:
                self._row.fill(-1)
                self._used = 0

    def tags(self, refs: PageRefs, where: Places) -> NDArray[np.uint64]:
        """The tags of pages that the caller holds."""
        with self._arena._changed:
            missing = where.slots[self._row[where.slots] < 0]
            if len(missing):
                self._read(missing, where.slots)
            found: NDArray[np.uint64] = self._tables.reshape(-1).take(refs.pages + self._shift.take(where.of))
            return found

    def wrong(self, refs: PageRefs, where: Places) -> NDArray[np.int64]:
        """Positions of pages, which the caller holds, whose tag is another's.

        What was read before may be older than a page that was written since: only a tag read now is called wrong.
        """
        with self._arena._changed:
            known = bool((self._row[where.slots] >= 0).any())
            wrong = np.flatnonzero(self.tags(refs, where) != refs.generations)
            if len(wrong) and known:
                self.forget()
                wrong = np.flatnonzero(self.tags(refs, where) != refs.generations)
            return wrong

    def reserve(self, rows: int = 1) -> None:
        """Memory for so many tables or more; what was read is forgotten."""
        self.forget()
        rows = max(rows, FIRST_BYTES // (8 * self._tables.shape[1]))
        self._pinned = None
        shape = (rows, self._tables.shape[1])
        if isinstance(self._arena.copier, _kv.LoopbackCopier):
            self._tables = np.empty(shape, np.uint64)
            return
        import torch

        self._pinned = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        self._tables = self._pinned.numpy().view(np.uint64)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._arena.backend.device, priority=-1)  # type: ignore[attr-defined]

    def _read(self, missing: NDArray[np.int64], needed: NDArray[np.int64]) -> None:
        if self._used + len(missing) > len(self._tables):
            if len(needed) > len(self._tables):
                self.reserve(2 * len(needed))
            self.forget()
            missing = needed
        room = len(self._tables) - self._used - len(missing)
        slots = np.concatenate([missing, self._ahead(int(missing[-1]), min(self._used, room, MOST_AHEAD))])
        rows = np.arange(self._used, self._used + len(slots))
        self._copy(rows, slots)
        self._row[slots] = rows
        self._shift[slots] = (rows - slots) * self._tables.shape[1]
        self._used += len(slots)
        self.reads += 1

    def _ahead(self, last: int, most: int) -> NDArray[np.int64]:
        """Mapped chunks behind the `last` that have not been read, of the next `most`."""
        ahead = np.arange(last + 1, min(last + 1 + most, self._arena.slots))
        unread = ahead[self._row[ahead] < 0].tolist()
        return np.array([slot for slot in unread if self._arena._ledger.is_mapped(slot)], np.int64)

    def _copy(self, rows: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        arena, size = self._arena, self._tables.shape[1] * 8
        sources = slots * arena.chunk_bytes + (arena.space.base + arena.layout.tag_offset)
        targets = rows * size + self._tables.ctypes.data
        if self._pinned is None:
            for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
                ctypes.memmove(target, source, size)
            return
        import torch

        with torch.cuda.device(arena.backend.device):  # type: ignore[attr-defined]
            sizes = np.full(len(slots), size, np.uint64)
            _kv.copy_batch(targets.astype(np.uint64), sources.astype(np.uint64), sizes, self._stream.cuda_stream)
            self._stream.synchronize()
