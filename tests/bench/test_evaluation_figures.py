"""What the stored report of an H200 says of two runs follows from its rows."""

from __future__ import annotations

import json
from pathlib import Path

from bench.evaluation_figures import summary

REPORT = Path(__file__).parents[2] / "bench/results/evaluation_H200.json"


def test_two_passes_are_those_of_the_last_run_that_has_two() -> None:
    report = json.loads(REPORT.read_text())
    found = summary(report["verdicts"], {})["two_runs"]
    assert json.loads(json.dumps(found)) == report["two_runs"]
    assert found["of_run"] == 2 < max(row["run"] for row in report["verdicts"])
