"""bench.end_to_end's figures, worked out by hand, and its refusals; no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import e2e_report, end_to_end
from bench.e2e_configurations import CONFIGURATIONS, chosen, server_arguments
from bench.e2e_searches import tokens_at_verdicts
from bench.e2e_servers import Gpus
from specgen_engine.errors import SpecGenError
from specgen_engine.replay.trace import BUNDLED


def candidate(name: str, speedup: float | None, verdict_s: float, order: int, forks: list[int]) -> dict[str, Any]:
    status = "correct" if speedup else "wrong"
    return {
        "hash": name, "status": status, "speedup": speedup, "submitted_s": verdict_s - 2.0, "verdict_s": verdict_s,
        "order": order, "forks": forks, "source": "fork" if forks else "base", "profiled": False,
    }  # fmt: skip


def fork(n: int, tokens: int, of: str | None) -> dict[str, Any]:
    return {"n": n, "tokens": tokens, "candidate": of, "prefix_reused": 90, "prefix_computed": 10}


ALONE: dict[str, Any] = {
    "configuration": "sequential", "trace": "t", "group": "ours", "seed": 0, "client_s": 100.0, "wall_s": 100.0,
    "reasoning_s": 90.0, "reasoning_tokens": 900, "answer_tokens": 100, "fork_tokens": 0,
    "accepted": {"speedup": 2.0}, "candidates": [candidate("own", 2.0, 100.0, 0, [])], "forks": [],
    "verdict_tokens": [1000],
}  # fmt: skip
FORKED: dict[str, Any] = {
    **ALONE, "configuration": "specgen", "client_s": 40.0, "wall_s": 40.0, "reasoning_s": 40.0,
    "reasoning_tokens": 360, "answer_tokens": 0, "fork_tokens": 300, "accepted": {"speedup": 1.6},
    "candidates": [candidate("a", None, 10.0, 0, [1]), candidate("b", 1.6, 40.0, 1, [2, 3])],
    "forks": [fork(1, 100, "a"), fork(2, 100, "b"), fork(3, 100, "b")], "verdict_tokens": [190, 660],
}  # fmt: skip


def test_one_trace_beside_its_sequential_run() -> None:
    found = e2e_report.compare(FORKED, ALONE, 1.5)
    assert (found["met"], found["gain"], found["accepted_over_final"]) == (True, 2.5, 0.8)
    assert found["best_by_time"] == {"25%": 0.0, "50%": 0.8, "75%": 0.8, "100%": 0.8}
    assert found["best_by_tokens"] == {"25%": 0.0, "50%": 0.0, "75%": 0.8, "100%": 0.8}
    assert found["base_rate_over_sequential"] == pytest.approx(0.9)


def test_a_verdict_that_no_decision_followed_came_after_all_tokens() -> None:
    row = {**ALONE, "verdict_tokens": []}
    spent = e2e_report.tokens(row)
    assert e2e_report.best_at_tokens(row, spent - 1) is None
    assert e2e_report.best_at_tokens(row, spent) == e2e_report.accepted(row)


def test_a_criterion_that_is_not_met_gains_nothing() -> None:
    found = e2e_report.compare(FORKED, ALONE, 1.7)
    assert (found["met"], found["gain"], found["time_over_sequential"]) == (False, 1.0, 0.4)


def test_tokens_by_kind_and_feedback() -> None:
    kinds = e2e_report.engine_tokens([FORKED])
    assert (kinds["fork"], kinds["wasted"], kinds["prefix_reused"]) == (300, 100, 270)
    said = e2e_report.feedback([FORKED])
    assert (said["correct"], said["latency_p50_s"]) == (1, 2.0)
    assert said["correct_per_minute"] == pytest.approx(1.5)
    assert said["correct_per_1000_tokens"] == pytest.approx(1000 / 660)


def test_busy_and_useful_shares_are_of_all_evaluators_and_whole_phases() -> None:
    phase = {"configuration": "specgen", "wall_s": 50.0, "gpu_seconds": {"useful": 20.0, "superseded": 10.0}}
    lines = e2e_report.summarise([ALONE, FORKED], [phase], 2, 1.5)
    assert [line["configuration"] for line in lines] == ["sequential", "specgen"]
    assert lines[1]["evaluators"] == {"busy": 0.3, "useful": 0.2}
    assert "evaluators" not in lines[0]


def test_tokens_are_those_of_the_first_question_that_knew_the_verdict() -> None:
    asked = [{"verdicts": 0, "tokens": 5}, {"verdicts": 2, "tokens": 70}, {"verdicts": 3, "tokens": 90}]
    assert tokens_at_verdicts(asked) == [70, 70, 90]


def test_configurations_share_servers_and_a_budget_needs_sequential() -> None:
    names = [one.name for one in chosen(["pause-and-probe", "specgen", "sequential"])]
    assert names == ["sequential", "specgen", "pause-and-probe"]
    assert CONFIGURATIONS["budget-50"].search(1.5, 1001).termination == "speedup:1.5|budget:tokens=500"
    with pytest.raises(SpecGenError, match="run that first"):
        CONFIGURATIONS["budget-50"].search(1.5)
    assert server_arguments("host", "peer") == ["--specgen-kv", "host"]
    assert server_arguments("pause", "off")[:2] == ["--specgen-scheduler-base-share", "0.001"]


def test_gpus() -> None:
    assert Gpus.parse("serve=0,eval=1,2") == Gpus(0, (1, 2))
    assert Gpus.parse("cpu").evaluators == 1
    with pytest.raises(SpecGenError, match="serve=0,eval"):
        Gpus.parse("serve=0")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--configurations", "nothing"], "use some of"),
        (["--gpus", "eval=1"], "serve=0,eval"),
        (["--resume", "absent.json"], "not readable"),
        (["--json", "absent/r.json"], "make it first"),
    ],
)
def test_bad_input_is_one_line(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--traces", str(BUNDLED), "--gpus", "cpu", "--json", str(tmp_path / "r.json"), *more]
    assert end_to_end.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
