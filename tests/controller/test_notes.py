"""The events of a search: in order, whole, and not more often than a reader can use."""

from __future__ import annotations

import asyncio
from typing import Any

from specgen_engine.controller.notes import Notes
from specgen_engine.controller.report import SearchRecord
from specgen_engine.evaluation.base import Status
from tests.controller.fakes import Rig, module


def told(**options: Any) -> list[tuple[str, dict[str, Any]]]:
    """The events of a search with one wrong fork, one that is accepted, and one that is cut off."""
    events: list[tuple[str, dict[str, Any]]] = []

    async def body() -> None:
        rig = Rig(publish=lambda kind, data: events.append((kind, data)), per_search=3, **options)
        rig.engine.say("reasoning on")
        for n, at in enumerate((4, 8, 12), 1):
            rig.trigger(at)
            await rig.settle()
            if n < 3:
                rig.fork(n, module(f"k{n}"))
                await rig.settle()
        rig.pool.judge("k1", None, Status.WRONG)
        await rig.settle()
        rig.pool.judge("k2", 2.0)
        await rig.end()

    asyncio.run(body())
    return events


def test_a_search_is_told_from_its_start_to_its_end() -> None:
    events = told()
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "ended"
    assert kinds.count("progress") == 1
    assert {data["search"] for _, data in events} == {"base"}
    times = [data["t"] for _, data in events]
    assert times == sorted(times)
    forks = [(data["fork"]["n"], data["fork"]["state"]) for kind, data in events if kind == "fork"]
    assert forks == [(1, "running"), (1, "stop"), (2, "running"), (2, "stop"), (3, "running")]
    candidates = [data["candidate"]["status"] for kind, data in events if kind == "candidate"]
    assert candidates == [None, None, "wrong", "correct"]
    assert [data["stage"] for kind, data in events if kind == "stage"] == ["queued", "compile"] * 2
    ended = events[-1][1]
    assert (ended["ended_by"], ended["accepted"]["speedup"]) == ("criterion", 2.0)
    assert "forks" not in ended


def test_progress_is_told_four_times_a_second_and_with_the_latest_words_only() -> None:
    now, said = [0.0], []
    notes = Notes(SearchRecord("a", "t", "h", "", "", 0.0), lambda kind, data: said.append(data), lambda: now[0])
    for step in range(100):
        now[0] = step / 50
        notes.progress(step, "x" * 10_000 + str(step), "reasoning")
    assert len(said) == 8
    assert all(len(data["tail"]) == 400 for data in said)
    assert said[-1]["tail"].endswith(str(said[-1]["tokens"]))
