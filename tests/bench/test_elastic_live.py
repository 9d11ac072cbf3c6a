"""The live half of the elastic study: its figures by hand, the simulator on a run that it must repeat exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import elastic, elastic_live
from bench.elastic_live import (
    TASK,
    Arrival,
    Ran,
    busy_intervals,
    figures_of,
    recorded,
    simulated,
    synthetic,
    units,
)
from bench.spans import Span, union
from specgen_engine.evaluation.base import Candidate
from specgen_engine.pools.policy import PolicyConfig, Role

V, P = Role.VALIDATE, Role.PROFILE
CONFIG = PolicyConfig(switch_s=0.0)
ARRIVALS = [Arrival(number, 0.1 * number, 0, TASK, Candidate(str(number)), f"c{number}") for number in range(3)]
STATIC = [
    Ran(0, V, 0.0, 0.0, 2.0, 1.5, "correct", "a"),
    Ran(0, P, 2.0, 2.0, 5.0, 2.0, "correct", "b"),
    Ran(1, V, 0.1, 2.0, 4.0, 1.5, "correct", "a"),
    Ran(1, P, 4.0, 5.0, 8.0, 2.0, "correct", "b"),
    Ran(2, V, 0.2, 4.0, 6.0, 1.5, "wrong", "a"),
]


def test_figures_of_a_run_worked_out_by_hand() -> None:
    figures = figures_of(STATIC, ARRIVALS, 2)
    assert figures["mean_feedback_s"] == pytest.approx((5.0 + 7.9 + 5.8) / 3)
    assert (figures["p50_feedback_s"], figures["p95_feedback_s"]) == (pytest.approx(5.8), pytest.approx(7.9))
    assert figures["utilisation_whole"] == pytest.approx(8.5 / 16)
    # Something waits from 0.1 to 5: validating works 0.5-2, 2.5-4, 4.5-5 of it, profiling 3-5.
    assert figures["utilisation"] == pytest.approx((1.5 + 1.5 + 0.5 + 2.0) / (2 * 4.9))


def test_a_gpu_is_busy_while_one_of_its_workers_is() -> None:
    spans = [Span(3.0, 4.0), Span(0.0, 1.0), Span(0.5, 2.0), Span(0.6, 0.7), Span(2.0, 2.5)]
    assert union(spans) == [(0.0, 2.5), (3.0, 4.0)]
    assert union([]) == []
    rows = [
        Ran(0, V, 0.0, 0.0, 4.0, 3.0, "wrong", "a"),  # 1 to 4
        Ran(1, V, 0.0, 0.0, 5.0, 3.0, "wrong", "a"),  # 2 to 5, beside it
        Ran(2, V, 0.0, 4.0, 8.0, 1.0, "wrong", "b"),  # 7 to 8; it waits until 4
    ]
    assert busy_intervals(rows) == {"a": [(1.0, 5.0)], "b": [(7.0, 8.0)]}
    figures = figures_of(rows, ARRIVALS, 2)
    assert figures["utilisation_whole"] == pytest.approx((4.0 + 1.0) / 16)
    assert figures["utilisation"] == pytest.approx(3.0 / 8)
    assert units(["cuda:0", "cuda:1", "cuda:0"]) == ["cuda:0", "cuda:1"]
    assert units(["cpu", "cpu"]) == ["cpu/0", "cpu/1"]


def test_the_simulator_repeats_a_static_run_from_its_service_times() -> None:
    model = simulated("static-1-1", ARRIVALS, STATIC, [STATIC], 2, CONFIG)
    assert model == {name: pytest.approx(value) for name, value in figures_of(STATIC, ARRIVALS, 2).items()}
    slow = [row._replace(busy_s=row.busy_s + 1, ended=row.ended + 1) for row in STATIC]
    slower = simulated("static-1-1", ARRIVALS, STATIC, [slow], 2, CONFIG)
    assert slower["mean_feedback_s"] > model["mean_feedback_s"] + 1, "the seconds are those of the source runs"


def test_bursts_and_recorded_answers(tmp_path: Path) -> None:
    arrivals = synthetic(20, 2, 8.0, 1)
    assert arrivals == synthetic(20, 2, 8.0, 1)
    assert sum(8.0 <= one.at < 9.0 for one in arrivals) == sum(one.at < 1.0 for one in arrivals) == 10
    with pytest.raises(ValueError, match=r"0 Triton answers match 'none', 5 are asked for"):
        recorded(tmp_path, "none", 5, 2, 1.0, 0)


@pytest.mark.parametrize(
    "words", [["--devices", "cpu"], ["--devices", "cuda:0,cuda:0"], ["--count", "1"], ["--bursts", "0"]]
)
def test_too_little_to_compare_is_refused(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        elastic.main(["--live", *words])
    assert "--live: use at least two devices, two candidates and one burst" in capsys.readouterr().err
    assert elastic.main(["--live", "--traces", "absent", "--count", "2"]) == 2


@pytest.mark.slow
def test_a_burst_on_live_workers_ends_under_every_policy(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    assert elastic.main(["--live", "--count", "10", "--gap-s", "3", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert set(report["policies"]) == {"elastic", "static-1-1", "fifo"}
    for row in report["policies"].values():
        assert {job["number"] for job in row["jobs"]} == set(range(10))
        assert {job["gpu"] for job in row["jobs"]} == {"cpu/0", "cpu/1"}
        assert abs(row["simulated_over_live_minus_1"]["utilisation_whole"]) < 0.5
    assert elastic_live.TOLERANCE == 0.15
