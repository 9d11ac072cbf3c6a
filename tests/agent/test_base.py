"""Budgets, what a run has spent, and which attempt is shown to the next iteration."""

from __future__ import annotations

import json

import pytest

from specgen_engine.agent.base import (
    AgentError,
    Attempt,
    Budget,
    Generation,
    Judgement,
    Spent,
    best_of,
    exhausted,
    failed_of,
    last_of,
    spent_by,
)
from specgen_engine.agent.figures import improvements, lane_of, progress_of
from specgen_engine.agent.prompts import messages_for
from specgen_engine.agent.report import as_html
from specgen_engine.evaluation.base import Status

TASK = "class Model: ...\n"


def attempt(
    iteration: int, speedup: float | None = None, search: int = 1, report: dict | None = None, **judged: object
) -> Attempt:
    start = 10.0 * iteration + search
    status = Status.CORRECT if speedup else Status.WRONG
    verdict = Judgement(
        f"hash-{search}-{iteration}", status, speedup, (speedup, speedup) if speedup else None, 1.0, 2.0,
        stages={"queued": 9.0, "compile": 1.0, "check": 2.0}, **judged,
    )  # fmt: skip
    generation = Generation("answer", True, 5, 100, 4.0, search=report)
    return Attempt(search, iteration, generation, f"source {search} {iteration}", start, start + 4, verdict, start + 8)


@pytest.mark.parametrize("field", ["iterations", "minutes", "tokens", "gpu_seconds"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_budget_of_nothing_is_refused(field: str, value: int) -> None:
    with pytest.raises(AgentError, match=f"--{field.replace('_', '-')} {value}: must be above zero"):
        Budget(**{field: value})


def test_each_limit_ends_a_run() -> None:
    budget = Budget(4, minutes=1, tokens=100, gpu_seconds=10)
    assert exhausted(budget, Spent(59.9, 99, 9.9)) is None
    assert "1 minutes" in (exhausted(budget, Spent(seconds=60)) or "")
    assert "100 tokens" in (exhausted(budget, Spent(tokens=100)) or "")
    assert "10 evaluator seconds" in (exhausted(budget, Spent(gpu_seconds=10)) or "")


def test_spent_counts_forks_and_no_queueing_and_each_candidate_once() -> None:
    report = {"fork_tokens": 50, "evaluation_s": 7.0}
    mine, again, theirs = attempt(1), attempt(1), attempt(2, report=report, by_endpoint=True)
    assert spent_by([mine, again, theirs], 3.0) == Spent(3.0, 350, 10.0)


def test_best_last_and_failed() -> None:
    attempts = [attempt(1, 1.5), attempt(2, 2.0), attempt(3), attempt(1, 3.0, search=2)]
    best = best_of(attempts)
    assert best is not None
    assert (best.search, best.speedup) == (2, 3.0)
    assert last_of(attempts, 1) is attempts[2]
    assert failed_of(attempts, 1) is attempts[2]
    assert failed_of(attempts, 2) is None


def test_attempts_survive_json() -> None:
    one = attempt(1, 1.5, report={"fork_tokens": 3})
    assert Attempt.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_prompt_shows_best_last_and_failed_with_profile_and_error() -> None:
    profile = "\n".join(f"profile line {n}" for n in range(40))
    attempts = [attempt(1, 2.0, profile=profile), attempt(2, digest="k.cu:3: expected ;")]
    (message,) = messages_for(TASK, "cuda:0", attempts, 1)
    text = message["content"]
    assert TASK.strip() in text
    assert "cuda:0" in text
    assert "The best so far: correct, 2.00x" in text
    assert "profile line 14" in text
    assert "profile line 15" not in text
    assert "k.cu:3: expected ;" in text
    assert text.count("source 1 2") == 1  # last and last failed are one candidate, shown once


def test_the_first_prompt_is_the_task_alone() -> None:
    (message,) = messages_for(TASK, "cpu", [], 1)
    assert "so far" not in message["content"]


SEARCH = {
    "fork_tokens": 30, "evaluation_s": 2.0, "reasoning_s": 2.5, "reasoning_tokens": 60, "wall_s": 4.0,
    "ended_by": "criterion",
    "forks": [{"n": n, "at_token": 10 * n, "tokens": 10, "started_s": 0.5 * n, "finished_s": 1.6} for n in (1, 2)],
    "candidates": [{"hash": "h", "status": "correct", "speedup": 1.4, "submitted_s": 1.6, "verdict_s": 2.4}],
}  # fmt: skip


def test_a_lane_packs_forks_and_evaluations_and_marks_the_early_end() -> None:
    lane = lane_of(attempt(1, 1.5, report=SEARCH, by_endpoint=True))
    assert [(bar.kind, bar.row) for bar in lane.bars] == [
        ("reasoning", 0), ("answer", 0), ("fork", 1), ("fork", 2), ("evaluation", 1),
    ]  # fmt: skip
    assert lane.ended_s == 11 + 2.5
    assert lane.rows == 3


def test_progress_counts_forks_verdicts_and_only_rises() -> None:
    points = progress_of([attempt(1, 1.5, report=SEARCH), attempt(2, 1.2)])
    assert [point.speedup for point in points] == [1.4, 1.5]
    assert points[0].tokens == round(130 * 2.4 / 4)
    assert points[1].tokens == 130


def test_improvements_carry_the_difference() -> None:
    found = improvements([attempt(1, 1.5), attempt(2, 1.2), attempt(3, 2.0)])
    assert [one.iteration for one, _ in found] == [1, 3]
    assert "-source 1 1" in found[1][1]
    assert "+source 1 3" in found[1][1]


def test_the_page_escapes_code_and_stands_alone() -> None:
    page = as_html(
        "<task>",
        {"model": "m", "base_url": "u", "device": "cpu"},
        [attempt(1, 1.5, report=SEARCH)],
        Spent(20, 130),
        "x",
    )
    assert "&lt;task&gt;" in page
    assert "src=" not in page
    assert "http://" not in page
    assert 'class="end"' in page
    assert as_html("t", {"model": "m"}, [], Spent(), "nothing done").count("No correct kernel yet") == 2
