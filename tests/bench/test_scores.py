"""Rows of bench.scores, and what bench.policies takes from reports as service times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.evaluation import Answer
from bench.scores import again_row, in_order, score_row
from bench.service_times import Kind, Service, ServiceTimes, read_service_times
from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict

KINDS: dict[str, Kind] = {
    "g/a/iter-1/fork-1.md": "cuda",
    "g/a/iter-1/fork-2.md": "cuda",
    "g/b/iter-1/final.md": "triton",
}


def verdict(status: Status, speedup: float | None) -> Verdict:
    stages = {Stage.COMPILE: 3.0, Stage.CHECK: 0.5, Stage.TIME: 1.0}
    interval = (speedup - 0.1, speedup + 0.1) if speedup else None
    return Verdict(
        "hash", status, "", speedup=speedup, interval=interval, candidate_ms=1.0, reference_ms=2.0, stages=stages
    )


def test_a_second_timing_takes_the_figures_and_keeps_the_service_times() -> None:
    first = score_row(verdict(Status.CORRECT, 2.0)) | {"import_s": 60.0}
    again = again_row(first, verdict(Status.CORRECT, 1.8))
    assert (again["speedup"], again["beside_compilers"], again["import_s"]) == (1.8, 2.0, 60.0)
    assert again_row(first, verdict(Status.WRONG, None)) == first
    assert "speedup" not in score_row(verdict(Status.WRONG, None))


def test_finals_come_first_and_iterations_by_number() -> None:
    names = ["t/iter-10/fork-1.md", "t/iter-2/fork-1.md", "t/iter-2/final.md"]
    answers = [Answer(name, Task("", "t"), Candidate(""), "torch") for name in names]
    assert [answer.name for answer in in_order(answers)] == [
        "t/iter-2/final.md",
        "t/iter-2/fork-1.md",
        "t/iter-10/fork-1.md",
    ]


def report(path: Path, **more: object) -> str:
    rows = [
        {
            "candidate": "g/a/iter-1/fork-1.md",
            "status": "correct",
            "stages": {"compile": 0.3, "check": 1.0, "time": 2.0},
        },
        {"candidate": "g/b/iter-1/final.md", "status": "correct", "stages": {"compile": 2.0, "check": 1.0}},
        {"candidate": "g/b/iter-1/other.md", "status": "correct", "stages": {}},
    ]
    path.write_text(json.dumps({"verdicts": rows, **more}))
    return str(path)


@pytest.mark.parametrize("more", [{"compile_s": [30.0, 40.0, 50.0]}, {"runs": [{"compile_s": [30.0, 40.0, 50.0]}, {}]}])
def test_builds_that_a_report_or_its_runs_list_stand_for_linked_ones(tmp_path: Path, more: dict[str, object]) -> None:
    times = read_service_times([report(tmp_path / "r.json", **more)], KINDS)
    assert times.of("g/a/iter-1/fork-1.md", "cuda") == Service(40.0, 3.0)
    assert times.of("g/b/iter-1/final.md", "triton") == Service(2.0, 1.0)
    assert (times.measured("g/a/iter-1/fork-1.md"), times.measured("g/a/iter-1/fork-2.md")) == (True, False)
    assert times.of("g/a/iter-1/fork-2.md", "cuda") == Service(40.0, 3.0)


def test_what_was_not_measured_is_not_made_up(tmp_path: Path) -> None:
    assert ServiceTimes().of("g/a/iter-1/fork-1.md", "cuda") is None
    (tmp_path / "cut.json").write_text('{"verdicts": [')
    with pytest.raises(ValueError, match="not usable"):
        read_service_times([str(tmp_path / "cut.json")], KINDS)


def test_rows_of_crowded_runs_do_not_count_where_idle_ones_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "f"
    row = {"candidate": "g/b/iter-1/final.md", "status": "correct", "stages": {"compile": 9.0, "check": 9.0}, "run": 1}
    report(path, runs=[{"idle": True}, {}])
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"verdicts": [*known["verdicts"], row]}))
    assert read_service_times([str(path)], KINDS).rows["g/b/iter-1/final.md"][1] == Service(2.0, 1.0)
    path.write_text(json.dumps(known | {"verdicts": [*known["verdicts"], row], "runs": [{}, {}]}))
    assert read_service_times([str(path)], KINDS).rows["g/b/iter-1/final.md"][1] == Service(9.0, 9.0)
