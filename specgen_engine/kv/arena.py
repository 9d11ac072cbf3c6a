"""The borrower's arena: chunks in slots, pages in chunks, copies in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgen_engine.kv.base import (
    ArenaFull,
    Backend,
    Copier,
    CopyTimeout,
    Counts,
    KvError,
    PageRefs,
    QuietLease,
    Space,
    StalePages,
)
from specgen_engine.kv.native import _kv
from specgen_engine.kv.tags import TagReader

OnQuiet = Literal["miss", "wait"]


@dataclass(eq=False)  # held in lists: one copy is never another
class Copy:
    """A transfer under way. `result()` must be asked before an import's bytes are used."""

    arena: PageArena
    ticket: int
    refs: PageRefs
    direction: _kv.Direction
    slots: frozenset[int]
    flags: NDArray[np.int32] | None = field(default=None, repr=False)

    def done(self) -> bool:
        return self.arena._reap_one(self)

    def poll(self) -> bool:
        """Whether the bytes have moved; `done` also gives the pages back to the books."""
        return self.arena.copier.done(self.ticket)

    def collect(self) -> NDArray[np.int32]:
        return self.arena.copier.take_flags(self.ticket)

    def wait(self, timeout_ms: int) -> bool:
        return self.arena.copier.wait(self.ticket, timeout_ms)

    def result(self, timeout_s: float = 10.0) -> None:
        """Wait for the copy.

        Raises:
            CopyTimeout: not finished within `timeout_s`; the copy goes on.
            StalePages: an import found pages of another generation; their bytes must not be used.
        """
        if not self.done() and not self.wait(int(timeout_s * 1000)):
            raise CopyTimeout(f"copy of {len(self.refs)} pages unfinished after {timeout_s} s")
        self.done()
        assert self.flags is not None
        if self.direction == _kv.Direction.IMPORT:
            stale = np.flatnonzero(self.flags != _kv.PAGE_MATCHES)
            if len(stale):
                raise StalePages(stale, f"{len(stale)} of {len(self.refs)} imported pages are of another generation")


class PageArena:
    """Pages in borrowed chunks. Thread-safe: the scheduler copies while a link's thread revokes.

    Args:
        backend: the memory's kind.
        planes: the device buffers whose rows make up a page.
        layout: where a page's rows go within a chunk.
        slots: chunks that fit at once.
        chunk_bytes: size of a chunk, the same for all lenders.
        max_segment_bytes: longer rows are moved in pieces of at most this.

    Raises:
        ValueError: a size the layout can't use, naming field and value.
    """

    def __init__(
        self,
        backend: Backend,
        planes: list[_kv.Plane],
        layout: _kv.ArenaLayout,
        slots: int,
        chunk_bytes: int,
        max_segment_bytes: int = 8192,
    ) -> None:
        self.backend = backend
        self.kind = layout
        self.layout = _kv.plan_page_layout(planes, layout, chunk_bytes, max_segment_bytes)
        self.chunk_bytes = chunk_bytes
        self.slots = slots
        self.space: Space = backend.space(slots, chunk_bytes)
        self.copier: Copier = backend.copier(self.layout, self.space.base)
        self._ledger = _kv.PageLedger(slots, self.layout.pages_per_chunk)
        self._copies: list[Copy] = []
        self._quiet_until: dict[int, float] = {}
        self._revoking: set[int] = set()
        self._retired: set[int] = set()  # slots that give out no more pages
        self.revocations = 0  # chunks called back so far: when it stands still, no page was lost
        self._changed = threading.Condition(threading.RLock())
        self.tags = TagReader(self)

    def add_chunk(self, fd: int) -> int:
        """Map a chunk into a free slot and return the slot; the descriptor stays the caller's.

        Raises:
            ArenaFull: every slot holds a chunk.
            KvError: the descriptor is no chunk of the agreed size; nothing was mapped.
        """
        with self._changed:
            slot = next((s for s in range(self.slots) if not self._ledger.is_mapped(s)), None)
            if slot is None:
                raise ArenaFull(f"all {self.slots} slots of the arena hold a chunk: make it with more slots")
            try:
                self.space.map(slot, fd)
            except (ValueError, RuntimeError) as error:
                raise KvError(f"refusing a chunk: {error}") from None
            self._ledger.add_chunk(slot)
            return slot

    def free_slots(self) -> int:
        with self._changed:
            return sum(not self._ledger.is_mapped(slot) for slot in range(self.slots))

    def allocate(self, count: int) -> PageRefs:
        """Pages with new generations, all or none. Raises ArenaFull."""
        with self._changed:
            pages = self._ledger.allocate(count)
            if len(pages) < count:
                raise ArenaFull(f"{count} pages asked for, {self.counts().free} free: release pages or grow the lease")
            return PageRefs(pages, self._ledger.generations(pages))

    def release(self, refs: PageRefs) -> int:
        """Give pages back; those whose chunk was revoked meanwhile are skipped. Returns how many became free.

        Raises ValueError, having freed nothing, when a page has a copy in flight or is listed twice.
        """
        with self._changed:
            self._reap()
            return int(self._ledger.release(refs.pages, refs.generations))

    def export(
        self,
        device_pages: ArrayLike,
        refs: PageRefs,
        after_stream: int = 0,
        quiet: OnQuiet = "miss",
        wait_s: float = 1.0,
    ) -> Copy:
        """Start copying device pages to arena pages, each tagged with its generation after its last byte.

        `device_pages` and `refs` have the same length. `after_stream` is the CUDA stream whose work the copy follows.

        Raises:
            StalePages: pages whose chunk was revoked; nothing was copied.
            QuietLease: the lender is timing; with quiet="wait", only after `wait_s`.
        """
        return self._submit(_kv.Direction.EXPORT, device_pages, refs, after_stream, quiet, wait_s)

    def import_(
        self,
        device_pages: ArrayLike,
        refs: PageRefs,
        after_stream: int = 0,
        quiet: OnQuiet = "miss",
        wait_s: float = 1.0,
    ) -> Copy:
        """Start copying arena pages to device pages; `Copy.result()` says which arrived whole. Raises as `export`."""
        return self._submit(_kv.Direction.IMPORT, device_pages, refs, after_stream, quiet, wait_s)

    def revoke(
        self,
        slots: Iterable[int],
        timeout_s: float,
        on_unmapped: Callable[[int], None] = lambda slot: None,
        only_unused: bool = False,
    ) -> list[int]:
        """Take chunks out of use, drain their copies, unmap them, each as soon as it is idle.

        `on_unmapped` is told of each slot at once. With `only_unused`, slots that hold used pages are left alone.
        Returns the slots that were unmapped in time; the rest stay in revocation, to be finished by another call.
        """
        with self._changed:
            pending = [s for s in slots if self._ledger.is_mapped(s) and not (only_unused and self.used_in(s))]
            for slot in pending:
                if slot not in self._revoking:
                    self._ledger.revoke_chunk(slot)
                    self._revoking.add(slot)
                    self.revocations += 1
                self._quiet_until.pop(slot, None)
            self._changed.notify_all()
        removed: list[int] = []
        deadline = time.monotonic() + timeout_s
        while pending:
            for slot in list(pending):
                with self._changed:
                    if slot not in self._revoking:  # another thread's revocation was first
                        pending.remove(slot)
                    elif self._unmap_if_idle(slot):
                        pending.remove(slot)
                        removed.append(slot)
                        on_unmapped(slot)
            if not pending or time.monotonic() >= deadline:
                break
            self._wait_for_any_copy(pending, deadline)
        return removed

    def pause(self, slots: Iterable[int], duration_s: float) -> None:
        """Start no copy on these slots for `duration_s`, or until `resume`; those in flight go on: see `drain`."""
        with self._changed:
            until = time.monotonic() + duration_s
            self._quiet_until.update(dict.fromkeys(slots, until))

    def resume(self, slots: Iterable[int]) -> None:
        with self._changed:
            for slot in slots:
                self._quiet_until.pop(slot, None)
            self._changed.notify_all()

    def drain(self, slots: Iterable[int], timeout_s: float) -> bool:
        """Wait until no copy touches the slots; False when that takes longer than `timeout_s`."""
        slots, deadline = list(slots), time.monotonic() + timeout_s
        while self._copies_in(slots):
            if time.monotonic() >= deadline:
                return False
            self._wait_for_any_copy(slots, deadline)
        return True

    def retire(self, slots: Iterable[int]) -> None:
        """Give out no more pages of these slots; those in use stay readable: their lender is gone, not the memory."""
        with self._changed:
            for slot in slots:
                self._ledger.pause_chunk(slot, True)
                self._retired.add(slot)

    def counts(self) -> Counts:
        with self._changed:
            self._reap()
            return Counts(*self._ledger.counts())

    def used_in(self, slot: int) -> int:
        """Pages of a slot that are used or in flight."""
        with self._changed:
            first = slot * self.layout.pages_per_chunk
            pages = np.arange(first, first + self.layout.pages_per_chunk)
            return int(np.count_nonzero(self._ledger.generations(pages)))

    def check_integrity(self) -> Counts:
        """Recount every page and every mapping. Raises KvError naming the counts that disagree."""
        with self._changed:
            counts = self.counts()
            try:
                self._ledger.check_integrity()
            except ValueError as error:
                raise KvError(f"arena: {error}") from None
            counts.check("arena")
            per_chunk = self.layout.pages_per_chunk
            if self.space.mapped * per_chunk != counts.total:
                raise KvError(
                    f"arena: {self.space.mapped} chunks of {per_chunk} pages mapped, {counts.total} pages booked"
                )
            return counts

    def _submit(
        self,
        direction: _kv.Direction,
        device_pages: ArrayLike,
        refs: PageRefs,
        after_stream: int,
        quiet: OnQuiet,
        wait_s: float,
    ) -> Copy:
        slots = frozenset(np.unique(refs.pages // self.layout.pages_per_chunk).tolist())
        with self._changed:
            self._await_quiet(slots, quiet, wait_s)
            self._reap()
            stale = self._ledger.begin_copy(refs.pages, refs.generations)
            if len(stale):
                raise StalePages(
                    stale.astype(np.int64),
                    f"{len(stale)} of {len(refs)} pages were revoked: they are lost, compute them again",
                )
            try:
                ticket = self.copier.submit(
                    direction, np.asarray(device_pages, np.int64), refs.pages, refs.generations, after_stream
                )
            except BaseException:
                self._ledger.end_copy(refs.pages)
                raise
            copy = Copy(self, ticket, refs, direction, slots)
            self._copies.append(copy)
            return copy

    def _await_quiet(self, slots: frozenset[int], quiet: OnQuiet, wait_s: float) -> None:
        deadline = time.monotonic() + (wait_s if quiet == "wait" else 0.0)
        while (until := max((self._quiet_until.get(slot, 0.0) for slot in slots), default=0.0)) > time.monotonic():
            left = deadline - time.monotonic()
            if left <= 0:
                raise QuietLease(f"the lender is quiet for another {until - time.monotonic():.3f} s")
            self._changed.wait(min(left, until - time.monotonic()))

    def _unmap_if_idle(self, slot: int) -> bool:
        self._reap()
        if self._ledger.copies_in(slot):
            return False
        self.space.unmap(slot)
        self._ledger.remove_chunk(slot)
        self._revoking.discard(slot)
        self._retired.discard(slot)
        return True

    def _copies_in(self, slots: list[int]) -> bool:
        with self._changed:
            self._reap()
            return any(self._ledger.copies_in(slot) for slot in slots)

    def _wait_for_any_copy(self, slots: list[int], deadline: float) -> None:
        with self._changed:
            copy = next((c for c in self._copies if not c.slots.isdisjoint(slots)), None)
        if copy is not None:
            copy.wait(max(1, int((deadline - time.monotonic()) * 1000)))

    def _reap(self) -> None:
        for copy in list(self._copies):
            self._reap_one(copy)

    def _reap_one(self, copy: Copy) -> bool:
        with self._changed:
            if copy.flags is None and copy.poll():
                copy.flags = copy.collect()
                self._ledger.end_copy(copy.refs.pages)
                self._copies.remove(copy)
            return copy.flags is not None
