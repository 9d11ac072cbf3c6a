"""Pages kept for copies that the arena does not issue itself, their tags, and pages moved out of a chunk's way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specgen_engine.kv.arena import Copy, OnQuiet, PageArena
from specgen_engine.kv.base import Copier, KvError, PageRefs, StalePages
from specgen_engine.kv.native import _kv
from specgen_engine.kv.tags import Places, places

POLL_S = 0.0002


@dataclass(eq=False)  # held in lists: one hold is never another
class Hold(Copy):
    """Pages in flight by somebody else's launch: a revocation waits for them as it does for a copy."""

    finished: Callable[[], bool] | None = field(default=None, repr=False)

    def finish_when(self, finished: Callable[[], bool]) -> None:
        """`finished` is asked from any thread, until it says yes once."""
        self.finished = finished

    def release(self) -> None:
        """Nothing is in flight any more, or nothing was launched."""
        self.finish_when(lambda: True)
        self.arena._reap_one(self)

    def poll(self) -> bool:
        return self.finished is not None and self.finished()

    def collect(self) -> NDArray[np.int32]:
        return np.empty(0, np.int32)

    def wait(self, timeout_ms: int) -> bool:
        end = time.monotonic() + timeout_ms / 1000
        while not self.poll():
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
        return True


def hold(
    arena: PageArena,
    refs: PageRefs,
    direction: _kv.Direction,
    quiet: OnQuiet = "miss",
    wait_s: float = 0.0,
    where: Places | None = None,
) -> Hold:
    """Keep pages mapped until the hold is finished or released. `where`: their places, if the caller knows them.

    Raises:
        StalePages: pages that were revoked; nothing is held.
        QuietLease: the lender is timing; with quiet="wait", only after `wait_s`.
    """
    slots = frozenset((where or places(arena, refs)).slots.tolist())
    with arena._changed:
        arena._await_quiet(slots, quiet, wait_s)
        stale = arena._ledger.begin_copy(refs.pages, refs.generations)
        if len(stale):
            raise StalePages(stale.astype(np.int64), f"{len(stale)} of {len(refs)} pages were revoked")
        held = Hold(arena, 0, refs, direction, slots)
        arena._copies.append(held)
        return held


def current(arena: PageArena, refs: PageRefs) -> NDArray[np.bool_]:
    """Which pages still have the generation they were given out with."""
    with arena._changed:
        where = places(arena, refs)
        mapped = np.zeros(arena.slots, np.bool_)
        for slot in where.slots.tolist():
            mapped[slot] = arena._ledger.is_mapped(slot) and slot not in arena._revoking
        answer: NDArray[np.bool_] = mapped[where.of]
        answer[answer] = arena._ledger.generations(refs.pages[answer]) == refs.generations[answer]
        return answer


def page_address(arena: PageArena, page: int) -> int:
    """Where a page of a page-first arena starts; its `page_bytes` lie there in the order of its planes."""
    slot, within = divmod(page, arena.layout.pages_per_chunk)
    return int(arena.space.base + slot * arena.chunk_bytes + within * arena.layout.page_bytes)


def tags(arena: PageArena, refs: PageRefs) -> NDArray[np.uint64]:
    """The generations that stand in memory beside the pages now, which the caller holds. Waits for them."""
    with arena._changed:
        arena.tags.forget()
        return arena.tags.tags(refs, places(arena, refs))


def allocatable(arena: PageArena) -> int:
    """Pages that `allocate` would give out: free ones whose lender is alive and keeps its chunk."""
    with arena._changed:
        return arena.counts().free - sum(_free_in(arena, slot) for slot in arena._retired)


def _free_in(arena: PageArena, slot: int) -> int:
    if not arena._ledger.is_mapped(slot) or slot in arena._revoking:
        return 0
    return int(arena.layout.pages_per_chunk - arena.used_in(slot))


class Mover:
    """Copies pages from one chunk of an arena to others, each chunk a plane of its own."""

    def __init__(self, arena: PageArena) -> None:
        if arena.kind != _kv.ArenaLayout.PAGE_FIRST:
            raise KvError("pages of a layer-first arena can't be moved between chunks: use PAGE_FIRST")
        self._arena = arena
        self._copiers: dict[int, Copier] = {}
        self._late: list[tuple[Hold, PageRefs]] = []  # targets of copies that were given up, until they end

    def evacuate(self, slot: int, timeout_s: float) -> tuple[PageRefs, PageRefs]:
        """Copy the idle, whole pages of a chunk to free pages of others; (old, new) of those that made it in time.

        The old pages stay as they are. Nothing more is given out of the chunk.
        """
        arena = self._arena
        self._free_late()
        with arena._changed:
            old = self._movable(slot)
            if len(old) == 0:
                return old, old
            new = arena.allocate(len(old))
            source = hold(arena, old, _kv.Direction.IMPORT)
            target = hold(arena, new, _kv.Direction.EXPORT)
        finished = False
        try:
            copier = self._copier(slot)
            rows = old.pages % arena.layout.pages_per_chunk
            ticket = copier.submit(_kv.Direction.EXPORT, rows, new.pages, new.generations, 0)
            finished = copier.wait(ticket, max(1, int(timeout_s * 1000)))
        finally:
            if finished:
                copier.take_flags(ticket)
                source.release()
                target.release()
            else:  # the chunk stays mapped until this copy ends, whenever that is
                source.finish_when(lambda: copier.done(ticket))
                target.finish_when(lambda: copier.done(ticket))
                self._late.append((target, new))
        return (old, new) if finished else (old.take(slice(0, 0)), new.take(slice(0, 0)))

    def _free_late(self) -> None:
        ended = [(held, refs) for held, refs in self._late if held.done()]
        self._late = [entry for entry in self._late if entry not in ended]
        for _, refs in ended:
            self._arena.release(refs)

    def _movable(self, slot: int) -> PageRefs:
        arena = self._arena
        if not arena._ledger.is_mapped(slot) or slot in arena._revoking:
            return PageRefs(np.empty(0, np.int64), np.empty(0, np.uint64))
        arena.retire([slot])
        arena._reap()
        first = slot * arena.layout.pages_per_chunk
        pages = np.arange(first, first + arena.layout.pages_per_chunk)
        generations = arena._ledger.generations(pages)
        busy = [copy.refs.pages for copy in arena._copies if slot in copy.slots]
        usable = (generations != 0) & ~np.isin(pages, np.concatenate([np.empty(0, np.int64), *busy]))
        refs = PageRefs(pages[usable], generations[usable])
        if len(refs):
            refs = refs.take(np.flatnonzero(tags(arena, refs) == refs.generations))
        return refs.take(slice(0, allocatable(arena)))

    def _copier(self, slot: int) -> Copier:
        if slot not in self._copiers:
            arena, size = self._arena, self._arena.layout.page_bytes
            plane = _kv.Plane(arena.space.base + slot * arena.chunk_bytes, size, size)
            layout = _kv.plan_page_layout([plane], _kv.ArenaLayout.PAGE_FIRST, arena.chunk_bytes)
            self._copiers[slot] = arena.backend.copier(layout, arena.space.base)
        return self._copiers[slot]
