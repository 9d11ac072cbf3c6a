"""A storm of faults: every job gets its verdict, nothing is left (bench/evaluation_storm.py)."""

from __future__ import annotations

import pytest

from bench.evaluation_storm import measure


def _survives(count: int, workers: int) -> None:
    found = measure(count, "cpu", workers, seed=7)
    assert found["lost_jobs"] == 0, found
    assert found["unexpected"] == [], found
    assert found["processes_left"] == [], found
    assert sum(found["verdicts"].values()) == count
    honest = sum(n for told, n in found["verdicts"].items() if told == "good: correct")
    assert found["seconds_of_an_honest_one"]["stages"]["time"]["n"] == honest
    timed = sum(n for told, n in found["verdicts"].items() if told.endswith("correct"))
    assert found["seconds_timed"]["n"] >= timed
    assert found["seconds_between_two_timings"]["n"] == found["seconds_timed"]["n"] - 1
    assert max(found["seconds_from_a_hang_to_the_next_check"], default=0) < 2.0, found


def test_50_evaluations() -> None:
    _survives(50, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_500_evaluations() -> None:
    _survives(500, 1)
