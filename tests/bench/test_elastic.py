"""The elastic study: virtual time against figures worked out by hand, the command against its report."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from bench import elastic
from bench.elastic_sim import Simulation, min_fair_share, parse_policy, percentile, simulate
from bench.elastic_workload import (
    CHECK_MOST_S,
    SCENARIOS,
    Candidate,
    Scenario,
    ServiceError,
    ServiceFit,
    Workload,
    fit_scores,
    workload,
)
from specgen_engine.pools.accounting import Outcome
from specgen_engine.pools.policy import PolicyConfig

CONFIG = PolicyConfig(switch_s=0.5)
DECISIONS = ("decision_us", "decision_p99_us", "decision_max_us")


def candidate(number: int, ready: float, check: float, profile: float, **more) -> Candidate:
    values = {"search": 0, "iteration": 0, "fork": number, "correct": profile > 0, "ends": False} | more
    return Candidate(number, submitted_s=ready, ready_s=ready, check_s=check, profile_s=profile, **values)


def by_hand(gpus: int, *candidates: Candidate, searches: int = 1) -> Workload:
    return Workload("by-hand", gpus, searches, 0, 300.0, candidates, (0.0,) * searches)


def run(load: Workload, policy: str) -> Simulation:
    state, roles = parse_policy(policy, load.gpus, CONFIG)
    simulation = Simulation(load, state, CONFIG)
    simulation.run(roles)
    return simulation


def test_a_static_pair_is_a_line_of_two_stages() -> None:
    result = run(by_hand(2, candidate(0, 0.0, 10.0, 4.0), candidate(1, 1.0, 10.0, 4.0)), "static-1-1").result()
    assert (result.p50_feedback_s, result.p95_feedback_s) == (23.0, 23.0)
    assert result.utilisation_whole == pytest.approx(28 / (2 * 300.0))
    assert result.utilisation == pytest.approx(0.5), (
        "while the second check waits, from 1 to 10 s, one GPU of two works"
    )
    assert (result.switches_per_gpu_s, result.judged) == (0.0, 2)


def test_fifo_changes_roles_for_the_oldest_job_and_pays_for_it() -> None:
    simulation = run(by_hand(2, candidate(0, 0.0, 10.0, 4.0), candidate(1, 1.0, 10.0, 4.0)), "fifo")
    assert sorted(simulation.feedback) == [14.5, 15.0], "10 + 0.5 + 4; from 1: 0.5 + 10, 0.5 + 4"


def test_elastic_takes_an_idle_gpu_over_and_switches_back() -> None:
    simulation = run(by_hand(1, candidate(0, 0.0, 10.0, 4.0)), "elastic")
    assert simulation.feedback == [pytest.approx(14.5)]
    assert simulation.switches == 1


def test_the_end_of_a_reasoning_cancels_what_waits_and_what_runs() -> None:
    ends = candidate(0, 0.0, 5.0, 2.0, ends=True)
    simulation = run(by_hand(2, ends, candidate(1, 1.0, 9.0, 2.0), candidate(2, 2.0, 9.0, 2.0)), "static-1-1")
    assert simulation.feedback == [7.0]
    assert simulation.cancelled == 2
    assert simulation.account.by_outcome() == {Outcome.USEFUL: 7.0, Outcome.SUPERSEDED: 0.0, Outcome.CANCELLED: 2.0}


def test_feedback_after_the_reasoning_is_superseded() -> None:
    simulation = run(by_hand(2, candidate(0, 170.0, 15.0, 2.0)), "static-1-1")
    assert simulation.account.by_outcome()[Outcome.SUPERSEDED] == 17.0


def test_fair_share_is_max_min_and_counts_what_was_due() -> None:
    wanted = {0: 10.0, 1: 100.0, 2: 100.0}
    assert min_fair_share({0: 10.0, 1: 45.0, 2: 45.0}, wanted, wanted) == 1.0
    assert min_fair_share({0: 10.0, 1: 60.0, 2: 30.0}, wanted, wanted) == pytest.approx(30 / 45)
    assert min_fair_share({0: 4.0, 1: 48.0, 2: 48.0}, wanted, wanted) == pytest.approx(0.4)
    assert min_fair_share({0: 4.0, 1: 48.0, 2: 48.0}, wanted, wanted | {0: 4.0}) == 1.0
    assert min_fair_share({0: 0.0}, {0: 0.0}, {0: 0.0}) == 1.0


def test_percentiles_are_nearest_rank_and_need_values() -> None:
    assert [percentile(list(range(100)), share) for share in (0.5, 0.95)] == [50, 95]
    with pytest.raises(ValueError, match="no candidate was judged"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("static-3-2", "V and P must be at least 1 and add up to 4 GPUs"),
        ("static-4-0", "V and P must be at least 1"),
        ("lifo", "use elastic, fifo or static-V-P"),
    ],
)
def test_an_unknown_policy_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"policy='{name}': {message}"):
        parse_policy(name, 4, CONFIG)


@pytest.mark.parametrize("scenario", list(SCENARIOS.values()), ids=list(SCENARIOS))
def test_a_workload_offers_its_load_and_repeats_by_seed(scenario: Scenario) -> None:
    load = workload(scenario, 8, 16, 3, 400.0)
    work = sum(one.check_s + one.profile_s for one in load.candidates)
    assert work == pytest.approx(scenario.load * 8 * 400.0, rel=0.25)
    assert work >= scenario.load * 8 * 400.0
    assert [one.ready_s for one in load.candidates] == sorted(one.ready_s for one in load.candidates)
    assert all(0 <= one.submitted_s <= 401.0 and 0 < one.check_s <= CHECK_MOST_S for one in load.candidates)
    assert load == workload(scenario, 8, 16, 3, 400.0)
    assert load != workload(scenario, 8, 16, 4, 400.0)


def test_shapes_are_what_they_are_called() -> None:
    share = {}
    for name in ("steady-validate", "on-off", "ramp"):
        times = [one.submitted_s for one in workload(SCENARIOS[name], 32, 64, 0, 400.0).candidates]
        share[name] = [
            sum(low <= time < high for time in times) / len(times) for low, high in ((0, 40), (40, 80), (0, 200))
        ]
    assert share["steady-validate"][2] == pytest.approx(0.5, abs=0.06)
    assert share["on-off"][0] > 5 * share["on-off"][1]
    assert share["ramp"][2] < 0.42


def test_elastic_keeps_its_promises_on_a_small_pool() -> None:
    config = PolicyConfig()
    loads = [workload(SCENARIOS["ramp"], 6, 24, seed, 300.0) for seed in range(3)]
    elastic_runs = [simulate(load, "elastic", config) for load in loads]
    static = {
        split: statistics.median(simulate(load, f"static-{split}-{6 - split}").p95_feedback_s for load in loads)
        for split in range(1, 6)
    }
    p95 = statistics.median(one.p95_feedback_s for one in elastic_runs)
    assert p95 <= 1.02 * min(static.values())
    assert statistics.median(static.values()) >= 2 * p95
    for one in elastic_runs:
        assert one.utilisation >= 0.97
        assert one.utilisation_useful < one.utilisation_whole <= 1.0
        assert one.switch_gap_s >= config.dwell_s
    again = simulate(loads[0], "elastic", config)
    assert {**again._asdict(), **dict.fromkeys(DECISIONS)} == {**elastic_runs[0]._asdict(), **dict.fromkeys(DECISIONS)}


def test_time_is_conserved_under_every_policy() -> None:
    load = workload(SCENARIOS["bursts"], 4, 8, 1, 200.0)
    for policy in elastic.policies(4):
        simulation = run(load, policy)
        result = simulation.result()
        assert simulation.clock.busy_s == pytest.approx(simulation.account.total())
        assert (simulation.clock.busy, simulation.clock.waiting, simulation.clock.held) == (0, 0, 0)
        never_ready = len(load.candidates) - result.judged - result.cancelled
        assert never_ready >= 0
        assert simulation.running == {}


def scores(path: Path) -> Path:
    good = {"status": "correct", "time_s": 0.15}
    answers = {
        f"set/{task}/iter-1/fork-{n}.md": good | {"import_s": (0.1, 40.0)[n % 2], "check_s": 2.0 * task}
        for task in (1, 2)
        for n in range(4)
    }
    answers["set/2/iter-1/fork-9.md"] = {"status": "wrong", "import_s": 0.1, "check_s": 4.0}
    path.write_text(json.dumps({"answers": answers}))
    return path


def test_a_fit_recovers_what_the_scores_say(tmp_path: Path) -> None:
    fit = fit_scores(scores(tmp_path / "scores.json"))
    assert fit.check_log_mean == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert fit.check_log_sd == pytest.approx(0.0)
    assert (fit.jit_share, fit.correct) == (pytest.approx(5 / 9), pytest.approx(8 / 9))
    assert fit.nvcc_log_mean == pytest.approx(math.log(40.0))
    assert fit.source == "scores.json"


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"answers": {"a/b/c": {"status": "correct"}}}'])
def test_scores_that_cannot_be_fitted_are_one_line(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ServiceError, match=r"--scores .*scores\.json: "):
        fit_scores(path)
    assert elastic.main(["--scores", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_writes_the_report_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(elastic, "QUICK", [elastic.Case(name, 4, 8, 2, length_s=150.0) for name in elastic.FIVE[:2]])
    out, figure = tmp_path / "elastic.json", tmp_path / "elastic.png"
    assert elastic.main(["--quick", "--seed", "7", "--json", str(out), "--plot", str(figure)]) == 0
    report = json.loads(out.read_text())
    assert (report["schema"], report["seed"]) == ("specgen.elastic/1", 7)
    assert {"machine", "command", "commit", "goals", "policy_config", "service"} <= report.keys()
    rows = report["scenarios"]
    assert len(rows) == 2 * 2 * 5
    assert {row["policy"] for row in rows} == {"elastic", "fifo", "static-1-3", "static-2-2", "static-3-1"}
    assert {row["seed"] for row in rows} == {7, 8}
    promised = "name gpus searches seed policy utilisation p50_feedback_s p95_feedback_s min_share switches_per_gpu_s"
    assert all({*promised.split(), "decision_us"} <= row.keys() for row in rows)
    assert [row["name"] for row in report["summary"]] == list(elastic.FIVE[:2])
    best = min(row["best_static_p95_s"] for row in report["summary"])
    assert best > 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elastic.json", "elastic.png"]
    assert "steady-validate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "absent/f.json"], "its folder does not exist; make it first"),
        (["--plot", "f.txt"], "use a name that ends in .png, .pdf or .svg"),
        (["--seeds", "0"], "use at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        elastic.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missed_goal_is_called_missed() -> None:
    case = elastic.Case("ramp", 4, 8, 1, length_s=150.0)
    rows = elastic.rows_of(case, 0, ServiceFit(), PolicyConfig())
    assert elastic.summarise(case, rows)["goals"]["utilisation"] is True
    for row in rows:
        if row["policy"] == "elastic":
            row |= {"utilisation": 0.96, "p95_feedback_s": 1e6, "switch_gap_s": 1.9}
    goals = elastic.summarise(case, rows)["goals"]
    missed = ("utilisation", "p95_over_best_static", "median_static_over_p95", "switch_gap_s")
    assert [goals[name] for name in missed] == [False] * 4
    assert goals["min_share"] is None, "it is a goal with 512 searches"
