"""bench.overhead's arithmetic, worked out by hand, and its refusals; no server."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from bench import overhead
from bench.overhead_traffic import RECORDED, Length, Served, lengths


def served(wall_s: float, ttft_s: float, gap_s: float, search_rate: float | None = None) -> Served:
    return Served(wall_s, 1000, [ttft_s, ttft_s, 2 * ttft_s], [gap_s, gap_s, 4 * gap_s], search_rate, 3)


def test_every_pair_of_arms_changes_places_from_round_to_round() -> None:
    places = [{arm.name: place for place, arm in enumerate(overhead.order(number))} for number in range(4)]
    for one, other in combinations([arm.name for arm in overhead.ARMS], 2):
        assert sum(place[one] < place[other] for place in places) == 2


def test_figures_of_one_burst() -> None:
    found = overhead.figures(served(4.0, 0.1, 0.01))
    assert (found["tokens_per_s"], found["ttft_p50_ms"], found["ttft_p95_ms"]) == (250.0, 100.0, 200.0)
    assert (found["gap_p50_ms"], found["gap_p99_ms"]) == (10.0, 40.0)
    assert found["gap_mean_ms"] == pytest.approx(20.0)
    assert found["search_rate"] is None


def test_ratios_are_paired_within_a_round() -> None:
    rounds = [
        {"off": served(w, 0.1, 0.01), "idle": served(w * 1.25, 0.2, 0.01), "searches": served(w, 0.1, 0.01, 50.0),
         "forks": served(w, 0.1, 0.01, 40.0)}
        for w in (1.0, 10.0)
    ]  # fmt: skip
    found = overhead.compared(rounds)
    assert found["idle/off"]["tokens_per_s"] == pytest.approx({"mean": 0.8, "low": 0.8, "high": 0.8})
    assert found["idle/off"]["ttft_p50_ms"]["mean"] == pytest.approx(2.0)
    assert found["forks/searches"]["search_rate"]["mean"] == pytest.approx(0.8)
    assert "search_rate" not in found["searches/idle"]
    assert overhead.compared(rounds[:1])["idle/off"]["tokens_per_s"] == {"mean": 0.8}


def test_medians_leave_out_what_an_arm_has_not() -> None:
    one = {arm.name: served(2.0, 0.1, 0.01, 50.0 if arm.trigger else None) for arm in overhead.ARMS}
    found = overhead.medians([one])
    assert "search_rate" not in found["off"]
    assert found["forks"]["search_rate"] == 50.0


def test_a_cpu_gets_the_recorded_lengths_shrunk() -> None:
    assert lengths(1)[0] == Length(*RECORDED[0])
    assert lengths(16)[2] == Length(4076 // 16, 107 // 4)
    assert min(one.output for one in lengths(1024)) == 4


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--json", str(tmp_path / "absent" / "r.json")]) == 2
    assert "make it first" in capsys.readouterr().err
    assert overhead.main(["--json", str(tmp_path / "r.json"), "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "config.json" in error
    assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        overhead.main(["--json", str(tmp_path / "r.json"), "--gpus", "a"])
