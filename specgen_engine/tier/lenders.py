"""The lenders of one arena: found by their sockets, borrowed from, given back to, looked for again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import ArenaFull, KvError, LeaseRefused, PageRefs, PeerGone, PeerTimeout
from specgen_engine.kv.borrower import Link
from specgen_engine.kv.hold import Mover
from specgen_engine.tier.metrics import Stats

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
POLITENESS_S = 10.0  # nothing is borrowed again from a lender that has just taken memory back


class Lenders:
    """Leases with every lender in a directory, up to a share of what each offers.

    Args:
        arena: maps the chunks.
        directory: of the lenders' sockets; need not exist yet.
        name: of this borrower; one lease a name and lender.
        share: into how many such parts a lender is divided between its borrowers.
        max_chunks: borrowed at most, from all lenders together.
        stats: counts revocations and losses.
    """

    def __init__(
        self, arena: PageArena, directory: Path, name: str, share: float, max_chunks: int, stats: Stats
    ) -> None:
        self.arena = arena
        self.directory = directory
        self.refusals: dict[str, str] = {}
        self._name = name
        self._share = share
        self._max_chunks = max_chunks
        self._stats = stats
        self._move: Callable[[PageRefs, PageRefs], int] | None = None
        self._mover = Mover(arena)
        self._links: dict[Path, Link] = {}
        self._last_revoked: dict[Path, float] = {}
        self._lost: set[Link] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def chunks(self) -> int:
        return sum(link.chunks for link in self._links.values())

    @property
    def alive(self) -> list[str]:
        return [path.stem for path, link in self._links.items() if link.lost is None]

    def watch(self, move: Callable[[PageRefs, PageRefs], int]) -> None:
        """From now on, pages that move are reported, and lenders that come later are borrowed from."""
        self._move = move
        self._thread = threading.Thread(target=self._run, name="kv-lenders", daemon=True)
        self._thread.start()

    def look(self) -> int:
        """Connect to lenders that are new and borrow what is free; returns chunks borrowed in all."""
        for path in sorted(self.directory.glob("*.sock")) if self.directory.is_dir() else []:
            link = self._links.get(path)
            if link is not None and link.lost is not None and link.chunks == 0:
                del self._links[path]
                link = None
            if link is None and path.exists():
                link = self._connect(path)
            if link is not None and link.lost is None:
                self._grow(path, link)
        self._note_losses()
        return self.chunks

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        for link in self._links.values():
            try:
                link.close(timeout_s=1.0)
            except KvError as error:
                logger.warning("ending a lease: %s", error)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:  # the next look may do better; requests go on without more memory
                logger.exception("looking for lenders")

    def _connect(self, path: Path) -> Link | None:
        def before_return(slots: list[int], bound_s: float) -> None:
            self._evacuate(path, slots, bound_s)

        try:
            link = Link(self.arena, path, self._name, before_return=before_return)
        except (PeerGone, PeerTimeout, LeaseRefused) as error:
            self.refusals[path.stem] = str(error)
            return None
        self.refusals.pop(path.stem, None)
        self._links[path] = link
        logger.info("lender %s offers %d chunks", path.stem, link.total_chunks)
        return link

    def _grow(self, path: Path, link: Link) -> None:
        if time.monotonic() - self._last_revoked.get(path, -POLITENESS_S) < POLITENESS_S:
            return
        try:
            while (want := self._wanted(link)) > 0:
                if link.grow(want) == 0:
                    return
        except (ArenaFull, PeerGone, PeerTimeout):
            return
        except LeaseRefused as error:
            self.refusals[path.stem] = str(error)

    def _wanted(self, link: Link) -> int:
        mine = max(1, int(link.total_chunks / self._share)) - link.chunks
        return min(mine, self._max_chunks - self.chunks, self.arena.free_slots())

    def _evacuate(self, path: Path, slots: list[int], bound_s: float) -> None:
        """On the link's thread, before the chunks are given up."""
        self._last_revoked[path] = time.monotonic()
        self._stats.add("revoked_chunks", len(slots))
        if self._move is None:
            return
        self.arena.retire(slots)
        end = time.monotonic() + bound_s
        for slot in slots:
            left = end - time.monotonic()
            if left <= 0:
                return
            try:
                old, new = self._mover.evacuate(slot, left)
                self._stats.add("moved_pages", self._move(old, new) if len(old) else 0)
            except KvError as error:
                logger.info("pages of a chunk that is taken back could not be moved: %s", error)

    def _note_losses(self) -> None:
        gone = {link for link in self._links.values() if link.lost is not None} - self._lost
        for link in gone:
            logger.warning("remote KV tier: %s", link.lost)
            self._stats.add("lenders_lost")
        self._lost |= gone
