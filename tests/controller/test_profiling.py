"""Profiles come behind verdicts: none delays the end of a reasoning, and none is left running behind a search."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from specgen_engine.controller import profiling
from specgen_engine.evaluation.base import Candidate, Status

from .fakes import Rig, source

HASH = Candidate(source("a")).hash


def run(rig_options: dict[str, str | float], play: Callable[[Rig], Awaitable[None]]) -> Rig:
    async def all_of_it() -> Rig:
        rig = Rig(**rig_options)  # type: ignore[arg-type]
        await rig.settle()
        await rig.fork_one("a")
        await play(rig)
        return rig

    return asyncio.run(all_of_it())


def test_a_verdict_ends_the_reasoning_and_the_profile_comes_after_the_answer() -> None:
    async def play(rig: Rig) -> None:
        rig.pool.judge("a", 2.0)
        await asyncio.wait_for(rig.client, 5)
        record = rig.session.record
        assert (record.ended_by, record.profiling, record.candidates[0].profile) == ("criterion", 1, "")
        rig.pool.profile("a", "memory bound")
        await rig.end()
        assert (record.profiling, record.candidates[0].profile) == (0, "memory bound")
        assert record.candidates[0].profile_s is not None
        assert record.evaluation_s == 2.0

    rig = run({"profile": "ncu"}, play)
    assert rig.pool.asked == [{"profile": "ncu"}]
    assert rig.pool.profiles[HASH].search == "base/profile"


@pytest.mark.parametrize(
    ("tool", "speedup", "status"), [("off", 1.2, None), ("ncu", None, Status.WRONG)], ids=["off", "wrong"]
)
def test_nobody_else_is_profiled(tool: str, speedup: float | None, status: Status | None) -> None:
    async def play(rig: Rig) -> None:
        rig.pool.judge("a", speedup, status)
        await rig.settle()
        await rig.end_quietly()

    assert run({"profile": tool}, play).pool.profiles == {}


def test_a_profile_that_is_not_the_accepted_candidates_ends_with_the_search() -> None:
    async def play(rig: Rig) -> None:
        rig.pool.judge("a", 1.2)  # not enough for the criterion
        await rig.settle()
        rig.engine.say("reasoning on</think>the answer", {"type": "stop"})
        await rig.settle()
        rig.session.close()
        await asyncio.gather(rig.client, return_exceptions=True)
        await rig.end()

    rig = run({"profile": "ncu", "streaming": True}, play)
    assert rig.pool.profiles[HASH].result.result().status is Status.CANCELLED
    assert rig.session.record.profiling == 0


def test_the_last_profile_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "LAST_S", 0.05)

    async def play(rig: Rig) -> None:
        rig.pool.judge("a", 2.0)
        await rig.end()
        assert rig.session.record.profiling == 0

    rig = run({"profile": "ncu"}, play)
    assert rig.pool.profiles[HASH].result.result().status is Status.CANCELLED
