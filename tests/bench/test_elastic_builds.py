"""The study of builds: with builders nothing quick waits where it waited for minutes."""

from __future__ import annotations

from bench.elastic_builds import Run, arrivals, study


def test_builders_keep_quick_candidates_from_waiting_and_delay_no_build() -> None:
    found = study(2, 0.25)
    assert found["workers"].quick_p95 > 60
    assert found["share"].quick_p95 < 2
    assert found["builders"].quick_p95 < 0.5
    assert found["builders"].build_p95 < found["workers"].build_p95


def test_every_candidate_of_a_load_is_judged() -> None:
    load = arrivals(3, 0.4)
    for way in ("workers", "share", "builders"):
        run = Run(load, way)
        run.go()
        assert len(run.quick) + len(run.built) == len(load)
        run.state.check_integrity()
