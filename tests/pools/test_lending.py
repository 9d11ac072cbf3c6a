"""A GPU whose memory is lent: quiet around timing and profiling, memory back before an evaluation needs it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specgen_engine.evaluation.base import Candidate, Stage, Status
from specgen_engine.pools import lending as lending_module
from specgen_engine.pools.base import Done, Reached, Work
from specgen_engine.pools.lending import LenderLending
from specgen_engine.pools.local import LocalBackend, LocalPool
from tests.pools.burst import LIMITS, SOURCES, TASK


class Diary:
    """A Lending that notes what it is asked, with what the worker was sent between."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def quiet(self, device: str, seconds: float) -> Iterator[bool]:
        self.notes.append(f"quiet {device} {seconds:g}")
        yield True
        self.notes.append("resume")

    def lends(self, device: str) -> bool:
        return True

    def make_room(self, device: str, need_bytes: int) -> int:
        self.notes.append(f"room {need_bytes}")
        return 0

    def make_room_ahead(self, starts_per_s: float, need_bytes: int) -> int:
        raise OSError("the tier is broken")


class Wire:
    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        message = json.loads(data)
        self.diary.notes.append(f"send {message['op']} {message.get('lent', message.get('reached'))}")


async def on_one_slot(quiet_s: float, messages: list[dict], diary: Diary | None = None) -> list[str]:
    diary = diary or Diary()
    backend = LocalBackend(("cuda:0",), lending=diary, room_bytes=100)
    told: list[object] = []
    backend.tell = told.append
    place = backend.places[0]
    place.writer = Wire(diary)  # type: ignore[assignment]
    place._take({"ready": True, "sandbox": "off"})
    backend.expect(1.0)
    backend.run(0, Work("j", 1, "evaluate", TASK, Candidate("x"), quiet_s))
    for _ in range(40):
        await asyncio.sleep(0.005)
    for message in messages:
        place._take({"job": "j"} | message)
        for _ in range(20):
            await asyncio.sleep(0.005)
    assert isinstance(told[-1], Done | Reached)
    return diary.notes


def test_a_job_on_lent_memory_has_room_first_and_quiet_when_it_asks_until_its_verdict() -> None:
    asked = [{"stage": "check"}, {"asks": "quiet"}, {"stage": "time"}, {"verdict": {}}]
    start = ["room 100", "send evaluate True"]
    assert asyncio.run(on_one_slot(0.0, asked[:1])) == start
    assert asyncio.run(on_one_slot(0.0, asked)) == [*start, "quiet cuda:0 30", "send quiet True", "resume"]
    again = [*asked[:3], {"asks": "quiet"}, asked[3]]
    notes = asyncio.run(on_one_slot(12.0, again))
    assert notes == [*start, "quiet cuda:0 12", "send quiet True", "send quiet True", "resume"], "a judge that was lost"


def test_a_tier_that_fails_keeps_no_job_from_running(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Diary):
        def make_room(self, device: str, need_bytes: int) -> int:
            raise OSError("no answer")

        def quiet(self, device: str, seconds: float):
            @contextmanager
            def held() -> Iterator[bool]:
                raise OSError("no answer")
                yield True

            return held()

    notes = asyncio.run(on_one_slot(0.0, [{"asks": "quiet"}, {"verdict": {}}], Broken()))
    assert notes == ["send evaluate True", "send quiet False"]
    assert "asking lent memory of cuda:0 back" in caplog.text
    assert "asking lent memory back ahead of jobs" in caplog.text


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


def test_memory_comes_back_ahead_of_jobs_on_as_many_devices_as_they_will_start_on(tmp_path: Path) -> None:
    support = pytest.importorskip("tests.kv.support")
    lenders = [support.make_lender(tmp_path, f"gpu{number}", chunks=2) for number in range(3)]
    side = support.Side("server")
    links = [side.connect(lender) for lender in lenders]
    for link in links:
        link.grow(2)

    def free(device: str) -> int:
        counts = lenders[int(device[-1])].counts()
        return counts.free * lenders[0].chunk_bytes

    held = LenderLending({f"cuda:{number}": lender for number, lender in enumerate(lenders)}, free)
    need = 2 * lenders[0].chunk_bytes
    try:
        assert held.make_room_ahead(0.0, need) == 0
        assert held.make_room_ahead(2.0 / lending_module.LEAD_S, need) == 2 * need
        assert [lender.counts().free for lender in lenders] == [2, 2, 0], "the third keeps what it lent"
        assert held.make_room_ahead(2.0 / lending_module.LEAD_S, need) == 0
    finally:
        for link in links:
            link.close()
        held.close()


def test_a_live_pool_times_without_copies_and_has_memory_back_ahead_of_jobs(lent, tmp_path: Path, monkeypatch) -> None:
    """The real worker and judge on the CPU, the real lender, and a borrower that copies all the time."""
    monkeypatch.setattr(lending_module, "LEAD_S", 600.0)  # one job in the last minute means ten to come
    lender, side, link = lent
    other = pytest.importorskip("tests.kv.support").make_lender(tmp_path / "other", chunks=1)
    other_link = side.connect(other)
    link.grow(2)
    other_link.grow(1)
    chunk = lender.chunk_bytes
    lending = LenderLending(
        {"cpu": lender, "idle": other}, lambda device: (other if device == "idle" else lender).counts().free * chunk
    )
    copies, over = Copies(side), threading.Event()
    copying = threading.Thread(target=copies.run, args=(over,))
    copying.start()
    try:
        spans, use, came_back_at = asyncio.run(timed_beside_copies(lending, other, chunk, tmp_path))
    finally:
        over.set()
        copying.join()
        other_link.close()
        other.close()
    assert use == ["turn, quiet"] * 3
    for began, ended in spans:
        assert not [at for at in copies.began if began < at < ended], "a copy began while a kernel was timed"
        assert [at for at in copies.began if at < began]
        assert [at for at in copies.began if at > ended]
    assert came_back_at < spans[1][0], "the device on which no job ever starts gave its memory back too"


class Copies:
    """Exports of a page, one after another; when each began."""

    def __init__(self, side) -> None:
        self.side, self.began = side, []

    def run(self, over: threading.Event) -> None:
        from specgen_engine.kv.base import KvError

        refs = self.side.arena.allocate(1)
        while not over.is_set():
            at = time.monotonic()
            try:
                self.side.arena.export([0], refs).wait(1000)
                self.began.append(at)
            except KvError:  # quiet, or called back
                pass
            time.sleep(0.002)


async def timed_beside_copies(lending, other, chunk: int, tmp_path: Path):
    pool = LocalPool(workers=1, limits=LIMITS, cache=tmp_path / "builds", lending=lending)
    pool.local.room_bytes = chunk
    spans, use, came_back_at = [], [], float("inf")
    try:
        await pool.start()
        for number in range(3):
            job = pool.submit(TASK, Candidate(SOURCES[Status.CORRECT].format(number)), search="s")
            began = 0.0
            async for stage in job.events():
                if other.counts().free:
                    came_back_at = min(came_back_at, time.monotonic())
                if stage is Stage.TIME:
                    began = time.monotonic()
            ended, verdict = time.monotonic(), await job.verdict()
            assert verdict.status is Status.CORRECT, verdict
            spans.append((began, ended))
            use.append(verdict.conditions["use"])
            await asyncio.sleep(0.2)
    finally:
        await pool.close()
    return spans, use, came_back_at
