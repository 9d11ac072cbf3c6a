"""The session's state machine against a mock engine: forks, verdicts, early end, graft, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from specgen_engine.controller.grace import OWN_GRACES, REPLACEABLE_GRACES
from specgen_engine.errors import RequestError
from specgen_engine.evaluation.base import Candidate, Status
from specgen_engine.protocol import EndSearch, WatchSearch
from tests.controller.fakes import PROMPT, Rig, module, output, source

Body = Callable[[], Awaitable[None]]


def run(body: Body) -> None:
    asyncio.run(body())


def test_a_good_fork_ends_the_reasoning_and_is_grafted() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        _, ids, options = rig.engine.last_fork
        assert bytes(ids[len(PROMPT) :]).decode() == "reasoning \n</think>\n\nNow: "
        assert options == {"max_new_tokens": 64, "temperature": 0.7}
        rig.fork(1, module("fast"))
        await rig.settle()
        rig.pool.judge("fast", 2.0)
        await rig.end()
        (final,) = rig.got
        assert final.text == "reasoning on\n</think>\n\n" + module("fast")
        assert final.finish == {"type": "stop", "matched": None}
        assert final.meta["completion_tokens"] == len(final.ids) == len(final.text)
        assert "base" in rig.engine.aborted
        record = rig.session.record
        assert (record.ended_by, record.accepted and record.accepted["speedup"]) == ("criterion", 2.0)
        assert record.forks[0].prefix_inserted == len(PROMPT) + 9
        assert isinstance(rig.engine.sent[0], WatchSearch)
        assert isinstance(rig.engine.sent[-1], EndSearch)

    run(body)


def test_a_slow_candidate_does_not_end_it_and_the_base_answers() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.fork(1, module("slow"))
        await rig.settle()
        rig.pool.judge("slow", 1.2)
        await rig.settle()
        rig.engine.say("reasoning on</think>" + module("own"), {"type": "stop"})
        await rig.settle()
        rig.pool.judge("own", 3.0)
        await rig.end()
        assert rig.got[-1].text.endswith(module("own"))
        assert rig.session.record.ended_by == "reasoning"
        assert rig.session.record.accepted == {
            "hash": rig.session.record.final["hash"],
            "source": "base",
            "speedup": 3.0,
        }

    run(body)


def test_a_faster_fork_replaces_the_bases_own_unstreamed_answer() -> None:
    async def body() -> None:
        rig = Rig(termination="none")
        await rig.fork_one("fork")
        rig.pool.judge("fork", 4.0)
        rig.engine.say("reasoning on\n</think>\n\n" + module("own"), {"type": "stop"})
        await rig.settle()
        rig.pool.judge("own", 3.0)
        await rig.end()
        assert rig.got[-1].text == "reasoning on\n</think>\n\n" + module("fork")
        assert source("own") not in rig.got[-1].text
        assert rig.got[-1].meta["completion_tokens"] == len(rig.got[-1].text)

    run(body)


@pytest.mark.parametrize(("speedup", "wins"), [(0.5, False), (1.5, True)])
def test_an_unjudged_own_answer_falls_only_to_a_kernel_faster_than_the_reference(speedup: float, wins: bool) -> None:
    async def body() -> None:
        rig = Rig(termination="none", grace_s=0.05)
        await rig.fork_one("fork")
        rig.pool.judge("fork", speedup)
        rig.engine.say("reasoning on</think>" + module("own"), {"type": "stop"})
        await rig.end()
        assert (source("fork") in rig.got[-1].text) is wins
        assert (rig.session.record.wall_s < OWN_GRACES * 0.05) is wins
        assert rig.session.record.wall_s >= (1 + REPLACEABLE_GRACES) * 0.05
        own = next(c for c in rig.session.record.candidates if c.source == "base")
        assert own.status is Status.CANCELLED

    run(body)


@pytest.mark.parametrize("other", [None, Status.WRONG, 0.5, 1.1], ids=["unfinished", "wrong", "slow", "fast"])
def test_after_the_grace_the_bases_own_verdict_is_awaited_without_the_others(other: Status | float | None) -> None:
    async def body() -> None:
        rig = Rig(termination="none", grace_s=0.15)
        await rig.fork_one("fork")
        if other is not None:
            rig.pool.judge("fork", None if isinstance(other, Status) else other)
        rig.engine.say("reasoning on</think>" + module("own"), {"type": "stop"})
        await asyncio.sleep(0.25)
        assert rig.session.record.ended_by is None
        assert Candidate(source("fork")).hash not in rig.session._competition.jobs
        rig.pool.judge("own", 1.2)
        await rig.end()
        assert rig.got[-1].text.endswith(module("own"))
        accepted = rig.session.record.accepted
        assert accepted is not None
        assert (accepted["source"], accepted["speedup"]) == ("base", 1.2)

    run(body)


@pytest.mark.parametrize("judged", [1.2, None], ids=["right", "wrong"])
def test_once_the_own_answer_is_right_late_candidates_get_a_small_share_of_the_time(judged: float | None) -> None:
    async def body() -> None:
        rig = Rig(termination="none", grace_s=60)
        await rig.fork_one("fork")
        rig.engine.say("reasoning on</think>" + module("own"), {"type": "stop"})
        await rig.settle()
        rig.session._start -= 20  # as if it had begun so long ago: half a second is left to the fork
        rig.pool.judge("own", judged)
        await asyncio.sleep(0.05)
        assert rig.session.record.ended_by is None
        await asyncio.sleep(0.7)
        assert (rig.session.record.ended_by is None) == (judged is None)
        if judged is None:
            rig.pool.judge("fork", 0.5)
        await rig.end()
        assert rig.got[-1].text.endswith(module("own" if judged else "fork"))

    run(body)


def test_the_bases_own_verdict_is_not_awaited_for_ever() -> None:
    async def body() -> None:
        rig = Rig(termination="none", grace_s=0.02)
        rig.engine.say("reasoning on</think>" + module("own"), {"type": "stop"})
        await rig.end()
        assert rig.session.record.accepted is None
        assert rig.session.record.wall_s >= OWN_GRACES * 0.02
        assert rig.got[-1].text.endswith(module("own"))

    run(body)


def test_streaming_passes_every_step_and_grafts_in_one_last_output() -> None:
    async def body() -> None:
        rig = Rig(streaming=True)
        for text in ("reas", "reasoning", "reasoning on"):
            rig.engine.say(text)
        rig.trigger(10)
        await rig.settle()
        assert [item.text for item in rig.got] == ["reas", "reasoning", "reasoning on"]
        rig.fork(1, module("fast"))
        await rig.settle()
        rig.pool.judge("fast", 2.0)
        await rig.end()
        assert rig.got[-1].text.startswith("reasoning on\n</think>")
        assert rig.got[-1].finish

    run(body)


def test_streaming_first_answer_token_ends_the_competition() -> None:
    async def body() -> None:
        rig = Rig(streaming=True)
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.fork(1, module("late"))
        await rig.settle()
        rig.engine.say("reasoning on</think>An")
        await rig.settle()
        assert rig.pool.jobs[next(iter(rig.pool.jobs))].result.result().status is Status.CANCELLED
        rig.engine.say("reasoning on</think>" + module("own"), {"type": "stop"})
        await rig.settle()
        rig.pool.judge("own", 1.1)
        await rig.end()
        assert rig.got[-1].text.endswith(module("own"))

    run(body)


def test_equal_candidates_are_evaluated_once() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on and on")
        rig.trigger(10)
        rig.trigger(15)
        await rig.settle()
        rig.fork(1, module("same"))
        rig.fork(2, module("same"))
        await rig.settle()
        (candidate,) = rig.session.record.candidates
        assert candidate.forks == [1, 2]
        rig.pool.judge("same", 1.6)
        await rig.end()

    run(body)


def test_a_step_that_comes_after_the_end_is_counted_for_its_fork_and_for_all() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on and on")
        for at in (10, 15):
            rig.trigger(at)
            await rig.settle()
        rig.fork(1, module("fast"))
        await rig.settle()
        rig.engine.forks["specgen-fork.base.2"].put_nowait(output("12345"))
        rig.pool.judge("fast", 2.0)
        await rig.end()
        record = rig.session.record
        assert record.forks[1].tokens >= 5
        report = record.to_dict()
        assert report["tokens"]["fork"] == report["fork_tokens"] == sum(fork.tokens for fork in record.forks)

    run(body)


def test_forks_per_search_and_per_prefix_are_capped() -> None:
    async def body() -> None:
        rig = Rig(per_search=2)
        rig.engine.say("reasoning on and on and on")
        for at in (10, 10, 15, 20):
            rig.trigger(at)
        await rig.settle()
        assert [fork.at_token for fork in rig.session.record.forks] == [10, 15]
        assert rig.session.record.forks_skipped == 1
        assert rig.budget.taken.total() == 2
        rig.client.cancel()
        task = rig.session.close()
        assert task is not None
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)
        assert rig.budget.taken.total() == 0

    run(body)


def test_a_trigger_waits_for_the_tokens_it_speaks_of() -> None:
    async def body() -> None:
        rig = Rig()
        rig.trigger(10)
        await rig.settle()
        assert not rig.engine.forks
        rig.engine.say("reasoning on")
        await rig.settle()
        assert len(rig.engine.forks) == 1
        rig.client.cancel()
        rig.session.close()

    run(body)


def test_a_bad_task_is_a_request_error_before_any_output() -> None:
    async def body() -> None:
        rig = Rig(streaming=True, problem="Model is missing")
        rig.pool.checked.clear()
        rig.engine.say("reasoning")
        await rig.settle()
        assert rig.got == []
        rig.pool.checked.set()
        with pytest.raises(RequestError, match=r"specgen\.task: Model is missing"):
            await rig.end()
        assert "base" in rig.engine.aborted

    run(body)


def test_a_bad_task_from_a_prompt_leaves_an_ordinary_answer() -> None:
    async def body() -> None:
        rig = Rig(named=False, problem="Model is missing")
        await rig.settle()
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        assert not rig.engine.forks
        rig.engine.say("reasoning on</think>answer", {"type": "stop"})
        await rig.end()
        assert rig.got[-1].text == "reasoning on</think>answer"
        assert "Model is missing" in rig.session.record.warning

    run(body)


def test_client_gone_cancels_everything() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.engine.gone = True
        with pytest.raises(ValueError, match="disconnected"):
            await rig.end()
        assert set(rig.engine.aborted) == {"base", "specgen-fork.base.1"}
        assert rig.budget.taken.total() == 0
        assert isinstance(rig.engine.sent[-1], EndSearch)

    run(body)


def test_an_engine_error_reaches_the_client() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.base.put_nowait(ValueError("input too long"))
        with pytest.raises(ValueError, match="input too long"):
            await rig.end()
        assert rig.session.record.ended_by == "error"

    run(body)


def test_a_failed_fork_is_recorded_and_the_search_goes_on() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.fork(1, "no kernel here", "length")
        await rig.settle()
        assert rig.session.record.forks[0].state == "length"
        assert rig.session.record.candidates == []
        rig.engine.say("reasoning on</think>done", {"type": "stop"})
        await rig.end()
        assert rig.got[-1].text.endswith("done")

    run(body)
