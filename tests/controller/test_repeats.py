"""When a fork that writes an earlier answer again is ended: learnt from forks that ended whole, never from nothing."""

from __future__ import annotations

import asyncio

import pytest

from specgen_engine.controller.repeats import (
    LEAST_TOKENS,
    MOST_SEEN,
    WHOLE_EVERY,
    Evidence,
    agreement,
    chance_of_new,
    worth_ending,
)
from specgen_engine.evaluation.base import Candidate, Status
from tests.controller.fakes import Rig, module, output, source


def seen(*whole: tuple[int, bool]) -> Evidence:
    evidence = Evidence()
    for agreed, same in whole:
        evidence = evidence.learnt(agreed, same)
    return evidence


@pytest.mark.parametrize(
    ("ids", "earlier", "tokens"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 4], 2), ([1, 2, 4], [1, 2], 2), ([3], [1], 0), ([], [1], 0)],
)
def test_agreement_ends_at_the_first_difference(ids: list[int], earlier: list[int], tokens: int) -> None:
    assert agreement(ids, earlier) == tokens


def test_without_a_repeat_seen_every_fork_may_be_new() -> None:
    assert chance_of_new(Evidence(), 500) == 1.0
    assert chance_of_new(seen((900, False), (700, False)), 500) == 1.0


def test_the_chance_counts_those_that_agreed_as_long() -> None:
    evidence = seen((1500, True), (1500, True), (1500, True), (200, False), (10, False))
    assert chance_of_new(evidence, 300) == 1 / 4
    assert chance_of_new(evidence, 200) == 2 / 5
    assert chance_of_new(evidence, 5) == 3 / 6
    assert chance_of_new(evidence, 1501) == 1.0, "nobody agreed so long"


def test_a_fork_is_ended_where_what_is_left_is_more_than_a_kernel_may_be_worth() -> None:
    """A kernel has cost 2,000 tokens; one in ten would be new: 600 tokens at three times the price."""
    evidence = seen(*[(1500, True)] * 9)
    assert worth_ending(evidence, 3.0, 100, 601, 8_000, 4)
    assert not worth_ending(evidence, 3.0, 100, 599, 8_000, 4)
    assert not worth_ending(evidence, 3.0, 100, 601, 9_000, 4)
    assert not worth_ending(evidence, 3.0, LEAST_TOKENS - 1, 10_000, 8_000, 4)
    assert not worth_ending(Evidence(), 3.0, 1_000, 5_000, 8_000, 4), "nothing is ended on no evidence"
    assert worth_ending(Evidence(), 0.0, LEAST_TOKENS, 1, 8_000, 4), "where a new kernel is worth nothing"
    assert not worth_ending(evidence, 3.0, 100, 5_999, 20_000, 0), "before the first candidate its price is all so far"


def test_one_in_eight_is_let_go_on_and_old_evidence_is_forgotten() -> None:
    evidence, ended = Evidence(), []
    for _ in range(2 * WHOLE_EVERY):
        evidence, really = evidence.chose()
        ended.append(really)
    assert [at for at, really in enumerate(ended, 1) if not really] == [WHOLE_EVERY, 2 * WHOLE_EVERY]
    assert len(seen(*[(100, True)] * (MOST_SEEN + 5)).seen) == MOST_SEEN


LONG = module("same") + "x" * 400
SURE = seen(*[(1500, True)] * 50)


async def two_forks(rig: Rig, evidence: Evidence) -> None:
    """The first one ends with a candidate; the second one has said 100 tokens."""
    rig.learner.repeats = evidence
    rig.engine.say("reasoning on and on")
    for at in (10, 15):
        rig.trigger(at)
        await rig.settle()
    rig.fork(1, LONG)
    await rig.settle()


async def say(rig: Rig, number: int, text: str) -> None:
    rig.engine.forks[f"specgen-fork.base.{number}"].put_nowait(output(text))
    await rig.settle()


@pytest.mark.parametrize(
    ("options", "evidence", "said", "ended"),
    [
        ({"end_repeats": 3.0}, SURE, LONG[:100], True),
        ({}, SURE, LONG[:100], False),
        ({"end_repeats": 3.0}, Evidence(), LONG[:100], False),
        ({"end_repeats": 0.0}, Evidence(), LONG[:100], True),
        ({"end_repeats": 3.0}, SURE, LONG[:99] + "?", False),
        ({"end_repeats": 3.0}, SURE, LONG[: LEAST_TOKENS - 1], False),
        ({"end_repeats": 3.0}, SURE._replace(chosen=WHOLE_EVERY - 1), LONG[:100], False),
    ],
    ids=["ended", "off", "no evidence", "worth nothing", "differs", "too short", "let go on"],
)
def test_a_fork_that_follows_an_earlier_one(options: dict, evidence: Evidence, said: str, ended: bool) -> None:
    async def body() -> None:
        rig = Rig(**options)
        await two_forks(rig, evidence)
        await say(rig, 2, said)
        first, second = rig.session.record.forks
        assert rig.engine.aborted == (["specgen-fork.base.2"] if ended else [])
        assert second.state == ("repeats: fork 1" if ended else "running")
        if ended:
            assert (second.candidate, second.tokens) == (first.candidate, 100)
            assert rig.budget.in_flight == 0
            assert rig.session.record.candidates[0].forks == [1], "it did not write it whole"
            assert rig.learner.repeats.seen == evidence.seen, "it proves nothing"
        await rig.end_quietly()

    asyncio.run(body())


def test_one_that_is_let_go_on_is_not_chosen_again() -> None:
    async def body() -> None:
        rig = Rig(end_repeats=3.0)
        await two_forks(rig, SURE._replace(chosen=WHOLE_EVERY - 1))
        await say(rig, 2, LONG[:100])
        await say(rig, 2, LONG[:200])
        assert rig.engine.aborted == []
        assert rig.learner.repeats.chosen == WHOLE_EVERY
        await rig.end_quietly()

    asyncio.run(body())


def test_one_that_had_ended_before_the_abort_keeps_its_kernel() -> None:
    async def body() -> None:
        rig = Rig(end_repeats=3.0)
        await two_forks(rig, SURE)
        queue = rig.engine.forks["specgen-fork.base.2"]
        queue.put_nowait(output(LONG[:100]))
        queue.put_nowait(output(module("own"), {"type": "stop"}))
        await rig.settle()
        assert rig.session.record.forks[1].state == "stop"
        assert rig.session.record.forks[1].candidate == Candidate(source("own")).hash
        await rig.end_quietly()

    asyncio.run(body())


def test_the_half_of_one_that_was_ended_is_no_candidate_even_where_it_holds_a_module() -> None:
    async def body() -> None:
        rig = Rig(end_repeats=3.0)
        await two_forks(rig, SURE)
        queue = rig.engine.forks["specgen-fork.base.2"]
        queue.put_nowait(output(LONG[:100]))
        queue.put_nowait(output(LONG[:100], {"type": "abort"}))
        await rig.settle()
        assert module("same") in LONG[:100]
        assert rig.session.record.forks[1].state == "repeats: fork 1"
        assert rig.session.record.candidates[0].forks == [1]
        await rig.end_quietly()

    asyncio.run(body())


def test_one_that_follows_a_fork_still_at_work_gets_its_candidate_once_that_is_known() -> None:
    async def body() -> None:
        rig = Rig(end_repeats=3.0)
        rig.learner.repeats = SURE
        rig.learner.answer_tokens = lambda task: 1_000.0  # type: ignore[method-assign]
        rig.engine.say("reasoning on and on")
        for at in (10, 15):
            rig.trigger(at)
            await rig.settle()
        await say(rig, 1, LONG[:200])
        await say(rig, 2, LONG[:100])
        first, second = rig.session.record.forks
        assert (second.state, second.candidate) == ("repeats: fork 1", None)
        rig.fork(1, LONG)
        await rig.settle()
        assert second.candidate == first.candidate == Candidate(source("same")).hash
        await rig.end_quietly()

    asyncio.run(body())


def test_whole_forks_teach_how_long_they_agreed_and_whether_they_were_the_same() -> None:
    async def body() -> None:
        rig = Rig(per_search=3)
        rig.engine.say("reasoning on and on and on")
        for at in (10, 15, 20):
            rig.trigger(at)
            await rig.settle()
        for number, name in enumerate(("a", "a", "b"), 1):
            rig.fork(number, module(name))
            await rig.settle()
        same, other = rig.learner.repeats.seen
        assert same == (len(module("a")), True)
        assert other == (module("b").index("'b'") + 1, False)
        rig.pool.judge("a", None, Status.WRONG)
        await rig.end_quietly()

    asyncio.run(body())


def test_one_that_was_cut_off_is_no_example_for_others() -> None:
    async def body() -> None:
        rig = Rig(end_repeats=3.0)
        rig.learner.repeats = SURE
        rig.engine.say("reasoning on and on")
        for at in (10, 15):
            rig.trigger(at)
            await rig.settle()
        rig.engine.forks["specgen-fork.base.1"].put_nowait(output(LONG, {"type": "abort"}))
        await rig.settle()
        await say(rig, 2, LONG[:100])
        assert rig.engine.aborted == []
        await rig.end_quietly()

    asyncio.run(body())
