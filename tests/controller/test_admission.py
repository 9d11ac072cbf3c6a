"""Forks whose feedback would come too late: the pool is asked first, and what it advised against is in the record."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from specgen_engine.controller.learning import LEAST_WHOLE, Learner
from specgen_engine.pools.policy import Admission, RoleLoad, admit
from tests.controller.fakes import TASK, FakePool, Rig, module


class BusyPool(FakePool):
    """Two GPUs that take 5 s for a candidate, `waiting` of them queued."""

    def __init__(self, waiting: int, idle: int = 0) -> None:
        super().__init__()
        self.validate = RoleLoad(waiting, 5.0 * waiting, 2, idle, 0.0, 5.0)
        self.asked: list[dict[str, float]] = []

    def admission(self, wanted: int, remaining_s: float, **fork: float) -> Admission:
        self.asked.append(fork | {"left_s": remaining_s})
        return admit(wanted, remaining_s, self.validate, RoleLoad(0, 0.0, 0, 0, 0.0, 0.0), **fork)  # type: ignore[arg-type]


def rig_on(pool: BusyPool, whole: int = 100, seconds: float = 10.0, **options: Any) -> Rig:
    """A search at `seconds` from its start; its family's reasonings so far have ended after `whole` tokens."""
    rig = Rig(termination="none", **options)
    rig.pool = rig.session.pool = rig.session._forks.pool = rig.session._competition.pool = pool
    for _ in range(LEAST_WHOLE if whole else 0):
        rig.learner.observe_whole(TASK.name, whole)
    rig.session._forks._now = lambda: seconds
    return rig


async def forked_at(rig: Rig, *positions: int, spec: str = "every:10") -> list[int]:
    rig.engine.say("x" * max(positions))
    for position in positions:
        rig.trigger(position, spec)
        await rig.settle()
    return [fork.at_token for fork in rig.session.record.forks]


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_a_fork_whose_feedback_comes_after_the_reasoning_is_not_made_and_is_in_the_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At token 50 after 10 s, 50 tokens are left: 10 s. Six candidates wait: 17.5 s, and 5 s for this one."""
    notes: list[tuple[str, dict[str, Any]]] = []
    caplog.set_level(logging.INFO, "specgen_engine.controller.forking")

    async def body() -> None:
        rig = rig_on(BusyPool(6), streaming=True, publish=lambda kind, data: notes.append((kind, data)))
        assert await forked_at(rig, 50) == []
        (late,) = rig.session.record.to_dict()["late_forks"]
        reason = "written in 0.0 s, feedback in 22.5 s, 10.0 s of reasoning are left"
        assert late == {
            "t_s": 10.0, "at_token": 50, "trigger": "every:10", "left_s": 10.0, "feedback_s": 22.5, "reason": reason,
        }  # fmt: skip
        assert [data["late_fork"] for kind, data in notes if kind == "late_fork"] == [late]
        assert f"no fork at token 50: {reason}" in caplog.text
        assert rig.session.record.forks_skipped == 0, "that counts forks for which there was no room"
        assert rig.budget.in_flight == 0
        rig.engine.say("x" * 50, {"type": "stop"})
        await rig.end()

    run(body)


@pytest.mark.parametrize(
    ("pool", "whole", "options", "why"),
    [
        (BusyPool(6), 0, {"streaming": True}, "nothing is known of the family"),
        (BusyPool(6), 50, {"streaming": True}, "no reasoning was as long as this one"),
        (BusyPool(1), 100, {"streaming": True}, "feedback comes in time"),
        (BusyPool(3), 100, {"grace_s": 13.0}, "an answer that is not streamed can be replaced until it is judged, too"),
        (BusyPool(0, idle=2), 51, {"streaming": True}, "an idle pool gets the first fork of a search"),
    ],
    ids=["unknown", "outlived", "in time", "grace", "idle"],
)
def test_a_fork_is_made(pool: BusyPool, whole: int, options: dict[str, Any], why: str) -> None:
    async def body() -> None:
        rig = rig_on(pool, whole, **options)
        assert await forked_at(rig, 50) == [50], why
        assert rig.session.record.late_forks == []
        await rig.end_quietly()

    run(body)


@pytest.mark.parametrize("grace_s", [13.0, 600.0])
def test_a_fork_that_only_the_grace_of_a_wrong_answer_would_save_is_not_made(grace_s: float) -> None:
    """10 s are left, the base's answer is judged 5 s later: 25 s, of which others get a fortieth then."""

    async def body() -> None:
        rig = rig_on(BusyPool(6), grace_s=grace_s)
        assert await forked_at(rig, 50) == []
        assert rig.session.record.late_forks[0].reason.endswith("10.0 s of reasoning are left, 5.6 s after it count")
        await rig.end_quietly()

    run(body)


def test_forks_that_are_being_written_count_and_only_the_first_of_a_search_is_made_anyway() -> None:
    """At 50 of 90 tokens 8 s are left and the idle GPU takes 5; at 52, 7.3 s, and it is the first fork's by then."""

    async def body() -> None:
        pool = BusyPool(0, idle=1)
        rig = rig_on(pool, 90, streaming=True)
        assert await forked_at(rig, 50, 52) == [50]
        assert [asked["coming"] for asked in pool.asked] == [0, 1]
        assert rig.session.record.late_forks[0].feedback_s == (2.5 + 5.0) / 2 + 5.0
        await rig.end_quietly()

    run(body)


def test_a_fork_that_somebody_asked_for_is_made_whenever_it_comes() -> None:
    async def body() -> None:
        pool = BusyPool(6)
        rig = rig_on(pool, 100, streaming=True)
        assert await forked_at(rig, 50, spec="asked") == [50]
        assert pool.asked == []
        await rig.end_quietly()

    run(body)


def test_a_search_teaches_how_long_its_forks_and_its_reasoning_were() -> None:
    async def body() -> None:
        rig = Rig(termination="none")
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.fork(1, module("a"))
        await rig.settle()
        rig.pool.judge("a", 2.0)
        rig.engine.say("reasoning on and on</think>")
        rig.engine.say("reasoning on and on</think>" + module("own"), {"type": "stop"})
        await rig.settle()
        rig.pool.judge("own", 1.0)
        await rig.end()
        assert rig.learner.answer_tokens(TASK.name) == len(module("a"))
        assert list(rig.learner._whole["toy/toy"]) == [len("reasoning on and on</think>")]

    run(body)


def test_what_is_left_of_a_reasoning_is_learnt_from_those_that_were_longer() -> None:
    learner = Learner("m")
    for tokens in (100, 200, 300):
        learner.observe_whole("t", tokens)
    assert learner.expected_left("t", 50) == math.inf, "three are too few"
    learner.observe_whole("t", 400)
    assert learner.expected_left("t", 150) == (50 + 150 + 250) / 3
    assert learner.expected_left("t", 400) == learner.expected_left("other", 0) == math.inf
    assert learner.answer_tokens("t") == 0.0
