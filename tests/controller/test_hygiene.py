"""What a search does with its forks: learns from them, harvests drafts, cuts those that reason on, tells of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from specgen_engine.config import EvaluationConfig, SpecGenConfig
from specgen_engine.controller.adaptive import Family, View
from specgen_engine.controller.competition import decide_again
from specgen_engine.controller.hooks import devices_shared, require_pool
from specgen_engine.controller.learning import Learner
from specgen_engine.controller.triggers import ADAPTIVE_POINTS, fire_points, parse_trigger
from specgen_engine.errors import ConfigError
from specgen_engine.evaluation.base import Candidate, Status
from specgen_engine.pools.ray_head import PoolError
from specgen_engine.serving.process import free_port
from tests.controller.fakes import PROMPT, Rig, module, output, source

Body = Callable[[], Awaitable[None]]


def run(body: Body) -> None:
    asyncio.run(body())


def test_a_drafted_module_is_judged_without_a_generation_and_can_be_grafted() -> None:
    async def body() -> None:
        rig = Rig()
        draft = module("draft")
        rig.engine.say(f"first\n{draft}then")
        rig.trigger(len("first\n" + draft), "draft")
        await rig.settle()
        assert rig.session.record.forks == []
        (candidate,) = rig.session.record.candidates
        assert (candidate.source, candidate.forks) == ("draft", [])
        rig.pool.judge("draft", 2.0)
        await rig.end()
        (final,) = rig.got
        assert final.text.endswith(f"\n</think>\n\n```python\n{source('draft')}\n```\n")
        assert rig.session.record.accepted == {"hash": candidate.hash, "source": "draft", "speedup": 2.0}

    run(body)


def test_a_draft_that_holds_no_module_is_nothing() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("no code at all here")
        rig.trigger(10, "draft:min=5")
        await rig.settle()
        assert rig.session.record.candidates == []
        assert rig.session.record.forks == []
        rig.client.cancel()

    run(body)


def test_adaptive_forks_where_the_policy_says_and_learns_from_every_fork() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("x" * 3_000)
        name = rig.learner.family("toy")
        rig.learner.families[name] = Family(first=50.0)  # kernels come often: forks should lie close
        rig.trigger(10, "adaptive")
        await rig.settle()
        assert rig.session.record.forks == []
        rig.trigger(200, "adaptive")
        await rig.settle()
        assert [fork.at_token for fork in rig.session.record.forks] == [200]
        rig.pool.queued = 3
        rig.trigger(900, "adaptive")
        await rig.settle()
        assert len(rig.session.record.forks) == 1
        rig.fork(1, module("one"))
        await rig.settle()
        rig.pool.judge("one", 1.2)
        await rig.settle()
        after = rig.learner.families[name]
        assert (after.first, after.first_tokens, after.forks) == (51.0, 1_200.0, 2.0)
        rig.trigger(1_000)
        await rig.settle()
        rig.fork(2, "no module here")
        await rig.settle()
        assert rig.learner.families[name].better_tokens == 4_000.0 + 800
        rig.client.cancel()

    run(body)


def test_a_fork_that_reasons_on_is_cut_and_billed() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.engine.forks["specgen-fork.base.1"].put_nowait(output("Hmm. Wait, let me think. Wait, actually no."))
        await rig.settle()
        (fork,) = rig.session.record.forks
        assert rig.engine.aborted == ["specgen-fork.base.1"]
        assert fork.state == "reasoned on"
        assert rig.session.record.candidates == []
        rig.client.cancel()

    run(body)


def test_candidates_that_differ_in_comments_are_judged_once_and_the_copy_can_win() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on and on")
        rig.trigger(10)
        rig.trigger(15)
        await rig.settle()
        rig.fork(1, module("same"))
        await rig.settle()
        rig.fork(2, module("same").replace("    name", "    # a comment\n    name"))
        await rig.settle()
        (candidate,) = rig.session.record.candidates
        assert candidate.forks == [1, 2]
        assert [fork.candidate for fork in rig.session.record.forks] == [candidate.hash] * 2
        rig.pool.judge("same", 1.6)
        await rig.end()
        assert rig.got[-1].text.endswith(module("same"))

    run(body)


@pytest.mark.parametrize("feedback", [True, False])
def test_the_next_fork_is_told_of_the_last_error_only_when_configured(feedback: bool) -> None:
    async def body() -> None:
        rig = Rig(feedback=feedback)
        rig.engine.say("reasoning on and on")
        rig.trigger(10)
        await rig.settle()
        rig.fork(1, module("bad"))
        await rig.settle()
        rig.pool.judge("bad", None, Status.COMPILE_ERROR, digest="k.cu:3: expected ;")
        await rig.settle()
        rig.trigger(15)
        await rig.settle()
        _, ids, _ = rig.engine.last_fork
        said = bytes(ids[len(PROMPT) :]).decode()
        assert ("k.cu:3: expected ;" in said) is feedback
        assert said.startswith("reasoning on an")
        assert said.endswith("\n</think>\n\nNow: ")
        rig.client.cancel()

    run(body)


def test_decisions_are_logged_with_their_inputs_and_can_be_made_again() -> None:
    async def body() -> None:
        rig = Rig(termination="best_of:2|budget:tokens=5000")
        rig.engine.say("reasoning on and on")
        rig.trigger(10)
        rig.trigger(15)
        await rig.settle()
        rig.fork(1, module("one"))
        rig.fork(2, module("two"))
        await rig.settle()
        rig.pool.judge("two", 1.2)
        await rig.settle()
        rig.pool.judge("one", 1.4)
        await rig.end()
        record = rig.session.record
        assert [one.verdicts for one in record.decisions] == [0, 1, 2]
        assert [one.accepted for one in record.decisions] == [None, None, Candidate(source("one")).hash]
        again = decide_again(record)
        assert [one.hash if one else None for one in again] == [one.accepted for one in record.decisions]
        record.termination = "speedup:9"
        assert decide_again(record) == [None] * 3

    run(body)


def test_a_budget_ends_the_reasoning_without_a_new_verdict() -> None:
    async def body() -> None:
        rig = Rig(termination="budget:tokens=200")
        rig.engine.say("reasoning on")
        rig.trigger(10)
        await rig.settle()
        rig.fork(1, module("slow"))
        await rig.settle()
        rig.pool.judge("slow", 0.5)
        await rig.settle()
        assert not rig.client.done()
        rig.engine.say("reasoning on" + "." * 200)
        await rig.end()
        assert "budget of tokens" in rig.session.record.reason

    run(body)


def test_what_is_learnt_survives_a_restart_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state" / "adaptive.json"
    first = Learner("model", path)
    first.observe("gemm", View(500, 0.0, 500), 1.3, 400)
    first.save()
    again = Learner("model", path)
    assert again.families == first.families
    assert again.families["model/gemm"].first == 2.0
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"--specgen-adaptive-state .*delete it to learn afresh"):
        Learner("model", path)


def test_adaptive_fires_at_its_points() -> None:
    pieces = ["word "] * 100 + ["end.\n\n"] + ["more "] * 400
    fired = fire_points(parse_trigger("adaptive"), pieces)
    assert (
        [at for at, _ in fired] == [at for at, _ in fire_points(parse_trigger(ADAPTIVE_POINTS), pieces)] == [101, 400]
    )
    assert {spec for _, spec in fired} == {"adaptive"}


def test_a_shared_pool_that_does_not_answer_refuses_the_start() -> None:
    address = f"127.0.0.1:{free_port()}"
    settings = SpecGenConfig(evaluation=EvaluationConfig(device=f"ray:{address}"))
    with pytest.raises(PoolError, match=f"--specgen-evaluation-device {address}: nothing answers there"):
        require_pool(settings)
    require_pool(SpecGenConfig())


@pytest.mark.parametrize(
    ("device", "engine", "shared"),
    [
        ("cuda:1", "cuda", []), ("cuda:0", "cuda", ["cuda:0"]), ("cuda", "cuda", ["cuda"]),
        ("cuda:1,cuda:2,cuda:3", "cuda", ["cuda:2"]), ("cpu", "cpu", []), ("cuda:0", "cpu", []),
    ],
)  # fmt: skip
def test_gpus_that_engine_and_evaluators_share_are_told(device: str, engine: str, shared: list[str]) -> None:
    server_args = SimpleNamespace(device=engine, base_gpu_id=0, gpu_id_step=2, tp_size=2, dp_size=1,
                                  enable_dp_attention=False)  # fmt: skip
    assert devices_shared(device, server_args) == shared


def test_what_a_shared_pool_would_not_heed_is_refused_beside_it() -> None:
    settings = SpecGenConfig(evaluation=EvaluationConfig(device="ray:127.0.0.1:1", sandbox="require", check_s=5))
    with pytest.raises(
        PoolError, match=r"^--specgen-evaluation-check-s, --specgen-sandbox: a shared pool evaluates as"
    ):
        require_pool(settings)


def test_the_pool_is_told_which_fork_is_the_newest() -> None:
    async def body() -> None:
        rig = Rig()
        rig.engine.say("reasoning on and on")
        rig.trigger(10)
        rig.trigger(15)
        await rig.settle()
        rig.fork(2, module("two"))
        await rig.settle()
        rig.fork(1, module("one"))
        await rig.settle()
        assert [job.fork for job in rig.pool.jobs.values()] == [2, 1]
        rig.client.cancel()

    run(body)
