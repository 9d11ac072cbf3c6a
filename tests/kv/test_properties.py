"""Random operations on real sockets and shared memory: the books add up on both sides after each one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from specgen_engine.kv.base import ArenaFull, LeaseRefused, PageRefs, PeerGone, StalePages
from specgen_engine.kv.borrower import Link
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.native import _kv
from tests.kv.support import Side, make_lender, open_fds

EXAMPLES, OPERATIONS = 100, 100  # 10,000 in all
KINDS = (
    "grow", "grow", "shrink", "claim", "close", "allocate", "allocate", "release", "export",
    "export", "import", "import",
    "revoke", "quiet", "crash borrower", "crash lender",
)  # fmt: skip
operations = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 1), st.integers(1, 24)), min_size=OPERATIONS, max_size=OPERATIONS
)
executed = 0


class Borrower:
    """A side with at most one link to each of two lenders, and what it believes its pages hold."""

    def __init__(self, name: str) -> None:
        self.side = Side(name, slots=12)
        self.links: dict[int, Link] = {}
        self.held: list[tuple[PageRefs, int | None]] = []  # pages and the value exported to them


class World:
    """Two lenders, two borrowers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lenders: list[Lender] = [make_lender(directory, f"lender{i}") for i in range(2)]
        self.borrowers = [Borrower(f"tp{i}") for i in range(2)]
        self.value = 0

    def run(self, kind: str, who: int, amount: int) -> None:
        borrower, number = self.borrowers[who], amount % 2
        getattr(self, kind.replace(" ", "_"))(borrower, number, amount)

    def claim(self, borrower: Borrower, number: int, amount: int) -> None:
        held = borrower.links.get(number)
        if held is not None and held.lost is None:
            with pytest.raises(LeaseRefused, match="already holds"):
                borrower.side.connect(self.lenders[number])
            return
        if held is not None:
            self.close(borrower, number, amount)
        borrower.links[number] = borrower.side.connect(self.lenders[number])

    def grow(self, borrower: Borrower, number: int, amount: int) -> None:
        if number not in borrower.links:
            self.claim(borrower, number, amount)
        link = borrower.links[number]
        try:
            assert 1 <= link.grow(1 + amount % 3) <= 3
        except (ArenaFull, LeaseRefused):
            pass
        except PeerGone:
            assert link.lost

    def shrink(self, borrower: Borrower, number: int, amount: int) -> None:
        if number in borrower.links:
            borrower.links[number].shrink(1 + amount % 3)

    def close(self, borrower: Borrower, number: int, amount: int) -> None:
        if number in borrower.links:
            borrower.links.pop(number).close()

    def allocate(self, borrower: Borrower, number: int, amount: int) -> None:
        try:
            borrower.held.append((borrower.side.arena.allocate(amount), None))
        except ArenaFull:
            assert borrower.side.arena.counts().free < amount or any(link.lost for link in borrower.links.values())

    def release(self, borrower: Borrower, number: int, amount: int) -> None:
        if borrower.held:
            borrower.side.arena.release(borrower.held.pop(amount % len(borrower.held))[0])

    def export(self, borrower: Borrower, number: int, amount: int) -> None:
        if not borrower.held:
            return
        index = amount % len(borrower.held)
        refs, _ = borrower.held[index]
        self.value += 1
        device = np.arange(len(refs))
        borrower.side.fill(device, self.value)
        try:
            borrower.side.arena.export(device, refs, quiet="wait").result()
        except StalePages:
            borrower.held.pop(index)
            return
        borrower.held[index] = (refs, self.value)

    def import_(self, borrower: Borrower, number: int, amount: int) -> None:
        if not borrower.held:
            return
        index = amount % len(borrower.held)
        refs, value = borrower.held[index]
        device = np.arange(len(refs)) + 32
        try:
            borrower.side.arena.import_(device, refs, quiet="wait").result()
        except StalePages as error:
            lost_chunk = "revoked" in str(error)
            assert lost_chunk or value is None, "pages that were exported came back under another generation"
            if lost_chunk:
                borrower.held.pop(index)
            return
        assert value is not None, "pages that were never exported were taken for good"
        assert borrower.side.holds(device, value)

    def revoke(self, borrower: Borrower, number: int, amount: int) -> None:
        for epoch in self.lenders[number].epochs().values():
            report = self.lenders[number].revoke(epoch, 1 + amount % 2, bound_s=5)
            assert report.outstanding == 0

    def quiet(self, borrower: Borrower, number: int, amount: int) -> None:
        with self.lenders[number].quiet(0.2, reach_s=2) as reached:
            assert reached

    def crash_borrower(self, borrower: Borrower, number: int, amount: int) -> None:
        if amount % 8:
            return
        for link in borrower.links.values():
            link.crash()
        self.borrowers[self.borrowers.index(borrower)] = Borrower(borrower.side.name)
        self.settle()

    def crash_lender(self, borrower: Borrower, number: int, amount: int) -> None:
        if amount % 8:
            return
        self.lenders[number].crash()
        self.lenders[number] = make_lender(self.directory, f"lender{number}")
        for other in self.borrowers:
            if number in other.links:
                other.links[number]._thread.join(timeout=5)
                assert other.links[number].lost

    def settle(self) -> None:
        """Wait until the lenders have seen that connections ended."""
        alive = {link.epoch for b in self.borrowers for link in b.links.values() if not link.lost}
        for lender in self.lenders:
            with lender._changed:
                assert lender._changed.wait_for(lambda held=lender: set(held.epochs().values()) <= alive, timeout=5)

    def check(self) -> None:
        for lender in self.lenders:
            lender.check_integrity()
        for borrower in self.borrowers:
            counts = borrower.side.arena.check_integrity()
            mapped = sum(link.chunks for link in borrower.links.values())
            assert counts.total == mapped * borrower.side.arena.layout.pages_per_chunk

    def end(self) -> None:
        for borrower in self.borrowers:
            for link in borrower.links.values():
                link.close()
            assert borrower.side.arena.check_integrity().total == 0
        for lender in self.lenders:
            lender.close()
            assert lender.check_integrity().free == lender.total_chunks


setattr(World, "import", World.import_)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(operations)
def run_operations(steps: list[tuple[str, int, int]]) -> None:
    global executed
    with tempfile.TemporaryDirectory(prefix="kv") as directory:
        before = open_fds()
        world = World(Path(directory))
        try:
            for step in steps:
                world.run(*step)
                world.check()
                executed += 1
        finally:
            world.end()
        assert open_fds() == before, "descriptors leaked: each pins its memory"


def test_ten_thousand_random_operations_keep_the_books() -> None:
    run_operations()
    assert executed >= EXAMPLES * OPERATIONS


ledger_steps = st.lists(
    st.tuples(st.sampled_from(("add", "revoke", "remove", "allocate", "release", "begin", "end")), st.integers(0, 3)),
    max_size=60,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(ledger_steps)
def test_ledger_alone_recounts_to_what_it_says(steps: list[tuple[str, int]]) -> None:
    ledger: Any = _kv.PageLedger(4, 5)
    held: list[PageRefs] = []
    copying: list[PageRefs] = []
    for kind, slot in steps:
        try:
            if kind in ("add", "revoke", "remove"):
                getattr(ledger, f"{kind}_chunk")(slot)
            elif kind == "allocate":
                pages = ledger.allocate(slot + 1)
                held.append(PageRefs(pages, ledger.generations(pages)))
            elif kind == "release" and held:
                ledger.release(*held[slot % len(held)])
            elif kind == "begin" and held and not len(ledger.begin_copy(*held[slot % len(held)])):
                copying.append(held[slot % len(held)])
            elif kind == "end" and copying:
                ledger.end_copy(copying.pop().pages)
        except _kv.UsageError:
            pass
        ledger.check_integrity()
