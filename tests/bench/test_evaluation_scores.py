"""Which side of a speed-up moved against the scores, and what explains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.evaluation_scores import compared, groups, main, markdown, modes, summary

REPORT = Path(__file__).parents[2] / "bench/results/evaluation_H200.json"


def row(
    name: str, ours: tuple[float, float], theirs: tuple[float, float], run: int = 1, **extra: float
) -> dict[str, Any]:
    """A verdict; ours and theirs: reference's and candidate's ms. extra: the candidate's other times."""
    return {
        "candidate": f"{name}.md", "run": run, "kind": "triton", "pass": "light", "status": "correct",
        "speedup": ours[0] / ours[1], "reference_ms": ours[0], "candidate_ms": ours[1],
        "extra_ms": {f"candidate_{key}": value for key, value in extra.items()},
        "score": {"status": "correct", "speedup": theirs[0] / theirs[1], "ms": theirs[1]},
    }  # fmt: skip


def only(rows: list[dict[str, Any]], name: str = "a/iter-1/one.md") -> Any:
    return next(found for found in compared(rows) if found.name == name)


OTHER = row("a/iter-1/two", (1.6, 1.0), (1.6, 1.0))
"""The scores' second measurement of the task's reference: 1.6 times the first."""


def test_a_reference_that_moved_is_explained_only_by_as_wide_a_spread_of_the_scores() -> None:
    moved = row("a/iter-1/one", (1.5, 1.0), (1.0, 1.0))
    found = only([moved, OTHER])
    assert (found.misses, found.moved, found.explained) == (True, "reference", "scores' own spread")
    alone = only([moved])
    assert (alone.moved, alone.explained) == ("reference", "")
    further = only([row("a/iter-1/one", (1.7, 1.0), (1.0, 1.0)), OTHER])
    assert further.explained == ""


def test_a_candidate_that_moved_is_explained_by_its_graph_or_by_another_verdict_here() -> None:
    late = row("a/iter-1/one", (1.0, 0.37), (1.0, 0.28), graph=0.279)
    assert (only([late]).moved, only([late]).explained) == ("candidate", "host late here")
    slow = row("a/iter-1/one", (1.0, 0.37), (1.0, 0.28), graph=0.36)
    assert only([slow]).explained == ""
    fast = row("a/iter-1/one", (1.0, 0.20), (1.0, 0.28), graph=0.279)  # a graph slower than the call shows no late host
    assert only([fast]).explained == ""
    before = row("a/iter-1/one", (1.0, 0.29), (1.0, 0.28), run=0)
    assert only([before, slow]).explained == "another run here agrees"


def test_two_sides_that_moved_need_an_explanation_each() -> None:
    both = row("a/iter-1/one", (2.0, 0.7), (1.3, 0.5))
    assert (only([both, OTHER]).moved, only([both, OTHER]).explained) == ("both", "")
    whole = row("a/iter-1/one", (1.5, 0.65), (1.0, 0.5), graph=0.5)
    assert only([whole, OTHER]).explained == "scores' own spread; host late here"


def test_what_is_within_10_percent_is_no_miss_and_groups_count_the_rest() -> None:
    some = compared(
        [row("a/iter-1/one", (1.09, 1.0), (1.0, 1.0)), row("a/iter-1/three", (1.5, 1.0), (1.0, 1.0)), OTHER]
    )
    (group,) = groups(some)
    assert (group["n"], group["misses"], group["moved"], group["explained"]) == (3, 1, {"reference": 1}, 1)
    assert "| a/three | 1.50 | 1.50 | 1.00 | none | reference | scores' own spread |" in markdown(some)
    assert "a/one" not in markdown(some)


def test_the_way_of_timing_that_agrees_is_told() -> None:
    some = compared([row("a/iter-1/one", (1.0, 0.37), (1.0, 0.28), graph=0.279, warm=0.25)])
    assert {mode: one["time_within"] for mode, one in modes(some)["all"].items()} == {
        "events": 0,
        "warm": 0,
        "graph": 1,
    }
    assert modes(some)["all"]["graph"]["off_p50"] == pytest.approx(0.0036)


def test_of_the_recorded_report_each_miss_has_a_side_and_a_line(monkeypatch, capsys) -> None:
    some = compared(json.loads(REPORT.read_text())["verdicts"])
    told = summary(some)
    assert told["n"] > 70
    assert sum(told["moved"].values()) == told["misses"] == sum(told["explained_by"].values()) > 0
    monkeypatch.setattr("sys.argv", ["", "--json", str(REPORT), "--markdown"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.count("|") == 8 and "/" in line and "ours/scores" not in line for line in lines) == told["misses"]
