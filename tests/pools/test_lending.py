"""A GPU whose memory is lent: quiet around timing and profiling, memory back before an evaluation needs it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specgen_engine.evaluation.base import Candidate
from specgen_engine.pools import lending as lending_module
from specgen_engine.pools.base import Done, Reached, Work
from specgen_engine.pools.lending import LenderLending
from specgen_engine.pools.local import LocalBackend
from tests.pools.burst import TASK


class Diary:
    """A Lending that notes what it is asked, with what the worker was sent between."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def quiet(self, device: str, seconds: float) -> Iterator[bool]:
        self.notes.append(f"quiet {device} {seconds:g}")
        yield True
        self.notes.append("resume")

    def make_room(self, device: str, need_bytes: int) -> int:
        self.notes.append(f"room {need_bytes}")
        return 0


class Wire:
    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        message = json.loads(data)
        self.diary.notes.append(f"send {message['op']}")


async def on_one_slot(quiet_s: float, messages: list[dict]) -> list[str]:
    diary = Diary()
    backend = LocalBackend(("cuda:0",), lending=diary, room_bytes=100)
    told: list[object] = []
    backend.tell = told.append
    place = backend.places[0]
    place.writer = Wire(diary)  # type: ignore[assignment]
    place._take({"ready": True, "sandbox": "off"})
    backend.run(0, Work("j", 1, "evaluate", TASK, Candidate("x"), quiet_s))
    for _ in range(40):
        await asyncio.sleep(0.005)
    for message in messages:
        place._take({"job": "j"} | message)
        for _ in range(20):
            await asyncio.sleep(0.005)
    assert isinstance(told[-1], Done | Reached)
    return diary.notes


def test_a_profile_begins_in_quiet_and_ends_it() -> None:
    notes = asyncio.run(on_one_slot(12.0, [{"stage": "check"}, {"stage": "time"}, {"verdict": {}}]))
    assert notes == ["room 100", "quiet cuda:0 12", "send evaluate", "resume"]


def test_the_timing_of_an_evaluation_is_quiet_too_and_nothing_else_of_it() -> None:
    notes = asyncio.run(on_one_slot(0.0, [{"stage": "check"}]))
    assert notes == ["room 100", "send evaluate"]
    notes = asyncio.run(on_one_slot(0.0, [{"stage": "check"}, {"stage": "time"}, {"verdict": {}}]))
    assert notes == ["room 100", "send evaluate", "quiet cuda:0 30", "resume"]


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[tuple]:
    support = pytest.importorskip("tests.kv.support")
    lender = support.make_lender(tmp_path, chunks=6)
    side = support.Side("server")
    link = side.connect(lender)
    yield lender, side, link
    link.close()
    lender.close()


def test_no_copy_starts_inside_a_lease_that_outlasts_the_lenders_longest_spell(lent, monkeypatch) -> None:
    lender, side, link = lent
    monkeypatch.setattr(lending_module, "MAX_QUIET_S", 0.2)
    link.grow(2)
    held = LenderLending({"cuda:0": lender}, lambda device: 0)

    def refused() -> bool:
        return any(until > time.monotonic() for until in side.arena._quiet_until.values())

    with held.quiet("cuda:0", 1.5) as reached:
        assert reached
        for _ in range(40):
            assert refused(), "a gap between two spells"
            time.sleep(0.02)
    stop = time.monotonic() + 2
    while refused():
        assert time.monotonic() < stop, "copies may go on once the lease is over"
        time.sleep(0.005)


def test_lent_memory_comes_back_in_whole_chunks_when_it_is_needed(lent) -> None:
    lender, _, link = lent
    link.grow(4)
    free = 3 * lender.chunk_bytes
    held = LenderLending({"cuda:0": lender}, lambda device: free)
    assert held.make_room("cuda:0", free) == 0
    assert held.make_room("cuda:0", free + 1) == lender.chunk_bytes
    assert held.make_room("cuda:0", 100 * free) == 3 * lender.chunk_bytes
    assert held.make_room("cuda:1", 1 << 40) == 0
    with held.quiet("cuda:1", 1.0) as reached:
        assert reached
