"""What the stored report of an H200 says of two runs follows from its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.evaluation_figures import latency, repeats, summary

REPORT = Path(__file__).parents[2] / "bench/results/evaluation_H200.json"


def test_two_passes_are_those_of_the_last_run_that_has_two() -> None:
    report = json.loads(REPORT.read_text())
    found = summary(report["verdicts"], {})["two_runs"]
    assert json.loads(json.dumps(found)) == report["two_runs"]
    assert found["of_run"] == 5
    former = [row for row in report["verdicts"] if row["run"] < 4]
    assert summary(former, {})["two_runs"]["of_run"] == 2 < max(row["run"] for row in former)


def row(name: str, speedup: float, behind: float) -> dict[str, Any]:
    return {
        "candidate": name, "speedup": speedup, "interval": [speedup * 0.9, speedup * 1.1], "candidate_ms": 1.0,
        "reference_ms": speedup, "conditions": {"host_behind": {"reference": behind, "candidate": 0.0}},
    }  # fmt: skip


def test_kernels_whose_host_decides_are_told_apart() -> None:
    first = [row("steady", 2.0, 0.1), row("steady too", 3.0, 0.0), row("late", 10.0, 1.0), row("late once", 9.0, 0.2)]
    second = [row("steady", 2.02, 0.1), row("steady too", 3.0, 0.0), row("late", 5.0, 1.0), row("late once", 8.0, 0.9)]
    found = repeats(first, second)
    assert (found["pairs"], found["gpu_decides"]["pairs"], found["host_decides"]["pairs"]) == (4, 2, 2)
    assert found["intervals_overlap"] == 3 == found["gpu_decides"]["intervals_overlap"] + 1
    assert found["gpu_decides"]["cv"]["max"] < 0.01 < 0.4 < found["host_decides"]["cv"]["max"]
    assert found["gpu_decides"]["half_width"]["p50"] == 0.1


def test_rows_from_before_the_host_was_asked_count_as_the_gpus() -> None:
    rows = [row("a", 2.0, 0.0) | {"conditions": None}, row("b", 2.0, 0.0) | {"conditions": {}}]
    assert "host_decides" not in repeats(rows, rows)


def test_what_contexts_take_is_told_beside_the_whole_overhead() -> None:
    rows = [
        {"kind": "cuda", "status": "correct", "verdict_s": 5.0 + at, "stages": {"compile": 4.0}, "overhead": steps}
        for at, steps in enumerate(
            [{"open": 0.3, "kill": 0.1}, {"spare": 1.0, "open": 0.5, "kill": 0.1}, {"kill": 0.2}]
        )
    ]
    found = latency(rows)["cuda"]
    assert found["overhead_s"] == {"n": 3, "p50": 0.4, "p95": 1.6}
    assert found["overhead_s_in_making_contexts"] == {"n": 3, "p50": 0.3, "p95": 1.5}
    assert next(iter(found["overhead_s_by_step"])) == "open"
