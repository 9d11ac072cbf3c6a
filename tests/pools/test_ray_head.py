"""The head of a Ray pool without a cluster, on a scripted backend: which clients it lets go, what they hear then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from specgen_engine.evaluation.base import Candidate, Status
from specgen_engine.pools.base import JobStage
from specgen_engine.pools.job import Order, outcome_value
from specgen_engine.pools.journal import Journal
from tests.pools.burst import LIMITS, TASK
from tests.pools.test_driver import Script

pytest.importorskip("ray")
from specgen_engine.pools import ray_head, ray_pool
from specgen_engine.pools.ray_backend import SupervisorOptions

SILENT = "the server that asked for it has been silent for"


class Handle:
    """The head as a client calls it. answers: it can be reached."""

    def __init__(self, head: ray_head.PoolHead) -> None:
        self.head = head
        self.answers = asyncio.Event()
        self.answers.set()

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: object) -> asyncio.Future[Any]:
                return asyncio.ensure_future(self._call(name, arguments))

        return Method

    async def _call(self, name: str, arguments: tuple[object, ...]) -> Any:
        await self.answers.wait()
        return await getattr(self.head, name)(*arguments)


@pytest.fixture
def on_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run with a head whose clients may be silent for 0.4 s."""
    for name, seconds in (("GONE_S", 0.4), ("LOOK_S", 0.05), ("HOLD_S", 0.1)):
        monkeypatch.setattr(ray_head, name, seconds)
    monkeypatch.setattr(ray_pool, "SNAPSHOT_S", 0.05)
    monkeypatch.setattr(Script, "units", {}, raising=False)
    monkeypatch.setattr(ray_head, "RayBackend", lambda options: Script())

    def run(use: Callable[[ray_head.PoolHead, Script], Awaitable[None]]) -> None:
        async def session() -> None:
            head = ray_head.PoolHead(tmp_path / "journal.db", SupervisorOptions(LIMITS))
            await head.start()
            await use(head, head._driver.backend)  # type: ignore[union-attr, arg-type]
            for task in head._tasks:
                task.cancel()
            await head.close()

        asyncio.run(session())

    return run


async def client_of(head: ray_head.PoolHead, monkeypatch: pytest.MonkeyPatch) -> tuple[ray_pool.RayPool, Handle]:
    handle = Handle(head)
    monkeypatch.setattr(ray_pool.RayPool, "_connect", lambda self: setattr(self, "_head", handle))
    pool = ray_pool.RayPool(None)
    await pool.start()
    return pool, handle


async def once(met: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not met():  # noqa: ASYNC110 (it looks at several objects)
            await asyncio.sleep(0.01)


def test_a_silent_client_is_let_go_and_hears_of_it_when_it_comes_back(
    on_head: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(head: ray_head.PoolHead, script: Script) -> None:
        script.up(0)
        silent, handle = await client_of(head, monkeypatch)
        other, _ = await client_of(head, monkeypatch)
        runs = silent.submit(TASK, Candidate("runs"), search="s", job="runs")
        waits = silent.submit(TASK, Candidate("waits"), search="s", job="waits")
        await once(lambda: script.work.get(0) is not None and waits.sent.is_set())
        handle.answers.clear()
        kept = other.submit(TASK, Candidate("kept"), search="s", job="kept")
        await once(lambda: ("cancel", "runs") in script.asked)
        script.done(0, Status.CANCELLED)
        await once(lambda: ("run", "kept") in script.asked)
        await asyncio.sleep(2 * ray_head.GONE_S)
        assert set(head._clients) == {other.name}, "one that asks stays, however long its jobs take"
        assert not waits.result.done()
        handle.answers.set()
        script.done(0, Status.WRONG)
        async with asyncio.timeout(5):
            assert (await waits.verdict()).reason.startswith(SILENT)
            ends = [(await job.verdict()).status for job in (runs, waits, kept)]
            assert ends == [Status.CANCELLED, Status.CANCELLED, Status.WRONG]
            after = silent.submit(TASK, Candidate("after"), search="s", job="after")
            await once(lambda: script.work[0].job == "after")
            script.done(0, Status.WRONG)
            assert (await after.verdict()).status is Status.WRONG
        await silent.close()
        await other.close()
        assert head._clients == {}

    on_head(use)


def test_jobs_of_a_server_that_died_before_the_heads_restart_are_let_go(
    on_head: Callable[..., None], tmp_path: Path
) -> None:
    order = Order(JobStage.EVALUATE, TASK, Candidate("x"), "host:1:dead/s/1")
    with Journal(tmp_path / "journal.db") as journal:
        for name in ("queued", "running"):
            journal.submit(name, order.search, order.stage, order.to_json())
        journal.start("running", "an earlier life")

    async def use(head: ray_head.PoolHead, script: Script) -> None:
        assert (await head.look())[0]["queued"] == 2, "its server may yet ask for them"
        pool = head._pool()
        await once(lambda: not pool.ledger.jobs)
        for name in ("queued", "running"):
            entry = pool.ledger.journal.entry(name)
            assert entry is not None
            verdict = outcome_value(str(entry.outcome))
            assert (verdict.status, verdict.reason[: len(SILENT)]) == (Status.CANCELLED, SILENT)
        assert (pool.ledger.searches, head._clients) == ({}, {})

    on_head(use)


def test_a_search_whose_server_never_submitted_is_forgotten(on_head: Callable[..., None]) -> None:
    async def use(head: ray_head.PoolHead, script: Script) -> None:
        await head.open_search("host:1:dead/s")
        searches = head._pool().ledger.searches
        assert list(searches) == ["host:1:dead/s"]
        await once(lambda: not searches)

    on_head(use)
