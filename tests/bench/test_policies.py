"""The offline study: virtual time is checked against figures worked out by hand, the command against its report."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench import policies
from bench.virtual_time import Answer, Machine, Recording, oracle_seconds, run_search, sequential
from specgen_engine.controller.termination import parse_termination
from specgen_engine.evaluation.base import Status
from specgen_engine.pools.policy import LATE_SHARE
from specgen_engine.replay.trace import BUNDLED

SHARED = Path(os.environ.get("SPECGEN_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
PLAIN = Machine(tokens_per_s=10, fork_slowdown=0.0, prefill_s=0.0, evaluators=1, compilers=1)


def answer(label: str, speedup: float | None, tokens: int = 100, compile_s: float = 0.0, gpu_s: float = 5.0) -> Answer:
    status = Status.WRONG if speedup is None else Status.CORRECT
    return Answer(label, label, tokens, status, speedup, compile_s, gpu_s)


def recording(*speedups: float | None, final: float | None = 2.0, **times: float) -> Recording:
    """1,000 tokens of reasoning, a mark every 100, 100 tokens an answer."""
    forks = tuple(answer(f"f{n}", speedup, **times) for n, speedup in enumerate(speedups, 1))
    marks = tuple(100 * n for n in range(1, len(speedups) + 1))
    return Recording("t", "f", 1_000, marks, forks, answer("final", final))


def test_sequential_is_reasoning_answer_and_verdict() -> None:
    outcome = sequential(recording(1.0), PLAIN)
    assert outcome.seconds == pytest.approx(100 + 10 + 5)
    assert (outcome.ended_by, outcome.forks, outcome.fork_tokens, outcome.verdicts) == ("reasoning", 0, 0, 1)
    assert outcome.base_tokens == 1_100


def test_a_fork_ends_the_reasoning_when_its_verdict_meets_the_target() -> None:
    outcome = run_search(recording(1.0, 3.0), PLAIN, parse_termination("speedup:2.5"), [100, 200, 300])
    assert outcome.seconds == pytest.approx(20 + 10 + 5)
    assert outcome.ended_by == "criterion"
    assert outcome.accepted is not None
    assert (outcome.accepted.hash, outcome.accepted.source) == ("f2", "fork")
    assert outcome.curve == (pytest.approx((25.0, 1.0)), pytest.approx((35.0, 3.0)))
    assert (outcome.best_at(24.0), outcome.best_at(30.0), outcome.best_at(99.0)) == (None, 1.0, 3.0)
    assert outcome.forks == 3
    assert outcome.fork_tokens == 100 + 100 + 50


def test_forks_queue_for_the_evaluators_and_known_candidates_are_not_evaluated_again() -> None:
    slow = recording(1.0, 3.0, gpu_s=30.0)
    one = run_search(slow, PLAIN, parse_termination("speedup:2.5"), [100, 150, 200])
    assert one.seconds == pytest.approx(20 + 30 + 30)
    assert (one.forks, one.verdicts) == (3, 2)
    two = run_search(
        slow, Machine(10, 0.0, 0.0, evaluators=2, compilers=1), parse_termination("speedup:2.5"), [100, 200]
    )
    assert two.seconds == pytest.approx(30 + 30)


def test_compiling_does_not_hold_an_evaluator() -> None:
    built = recording(1.0, 3.0, compile_s=20.0, gpu_s=5.0)
    wide = Machine(10, 0.0, 0.0, evaluators=1, compilers=2)
    assert run_search(built, wide, parse_termination("speedup:2.5"), [100, 200]).seconds == pytest.approx(30 + 20 + 5)
    assert run_search(built, PLAIN, parse_termination("speedup:2.5"), [100, 200]).seconds == pytest.approx(60 + 5)


def test_before_the_first_mark_a_fork_yields_no_candidate() -> None:
    outcome = run_search(recording(3.0), PLAIN, parse_termination("correct"), [50])
    assert (outcome.ended_by, outcome.forks, outcome.verdicts) == ("reasoning", 1, 1)


def test_forks_slow_the_base_while_they_run_and_a_cap_holds() -> None:
    slowed = run_search(recording(1.0), Machine(10, 0.1, 0.0, evaluators=1), parse_termination("none"), [100, 101])
    assert slowed.seconds == pytest.approx(115 + 0.1 * (0.1 + 9.9 * 2 + 0.1), abs=0.05)
    capped = run_search(recording(1.0), Machine(10, 0.1, 0.0, max_forks=1), parse_termination("none"), [100, 101])
    assert capped.forks == 1


NINE = [100 * n for n in range(1, 10)]


def test_the_bases_own_answer_goes_first() -> None:
    late = recording(*[1.0] * 9, final=1.5, gpu_s=55.0)
    outcome = run_search(late, PLAIN, parse_termination("none"), NINE)
    assert outcome.seconds == pytest.approx(20 + 2 * 55 + 5 + LATE_SHARE * 135), "the second was being judged"
    assert outcome.accepted is not None
    assert (outcome.accepted.source, outcome.ended_by, outcome.verdicts) == ("base", "reasoning", 3)


@pytest.mark.parametrize(
    ("gpu_s", "final", "seconds", "accepted"),
    [
        (94.0, 2.0, 115 + LATE_SHARE * 115, "final"),  # its verdict would come at 124, the own one is right
        (87.0, 2.0, 117, "f1"),  # a fortieth of the 115 s so far reaches it
        (94.0, None, 124, "f1"),  # the own one is wrong: the grace of 30 s from 110 on
        (111.0, None, 140, None),
    ],
)
def test_late_candidates_are_awaited_as_the_live_session_awaits_them(
    gpu_s: float, final: float | None, seconds: float, accepted: str | None
) -> None:
    late = recording(*[None] * 1, 3.0, final=final, gpu_s=gpu_s)
    late = replace(late, marks=(200,), forks=(late.forks[1]._replace(label="f1", hash="f1"),))
    outcome = run_search(late, replace(PLAIN, evaluators=2), parse_termination("none"), [200])
    assert outcome.seconds == pytest.approx(seconds)
    assert (outcome.accepted and outcome.accepted.hash) == accepted


def test_after_the_grace_a_base_without_a_verdict_is_awaited_alone_and_yields_to_a_faster_kernel_in_the_end() -> None:
    two = replace(PLAIN, evaluators=2)
    slow = replace(recording(1.2), final=answer("final", 2.0, compile_s=50.0))
    in_time = run_search(slow, two, parse_termination("none"), [100])
    assert (in_time.seconds, in_time.accepted and in_time.accepted.hash) == (pytest.approx(110 + 55), "final")
    stuck = replace(slow, final=answer("final", 2.0, compile_s=130.0))
    replaced = run_search(stuck, two, parse_termination("none"), [100])
    assert replaced.seconds == pytest.approx(110 + 30 + 90)
    assert (replaced.accepted and replaced.accepted.hash, replaced.correct) == ("f1", 1)
    slower = replace(slow, forks=(answer("f1", 0.9), answer("f2", 3.0, gpu_s=500.0)), marks=(100, 200))
    awaited = run_search(slower, replace(two, compilers=2), parse_termination("none"), [100, 200])
    assert awaited.seconds == pytest.approx(110 + 50 + 5)
    assert (awaited.accepted and awaited.accepted.hash, awaited.correct) == ("final", 2)
    never = replace(slow, forks=(), marks=(), final=answer("final", 2.0, compile_s=1_000.0))
    given_up = run_search(never, two, parse_termination("none"), [])
    assert (given_up.seconds, given_up.accepted) == (pytest.approx(110 + 30 + 300), None)


def test_forks_stop_when_the_base_has_answered_and_its_criterion_is_not_asked_any_more() -> None:
    heard: list[tuple[float, int]] = []
    long = replace(recording(3.0), forks=(answer("f1", 3.0, tokens=5_000),))
    outcome = run_search(long, PLAIN, parse_termination("none"), [900], observe=lambda *a: heard.append(a[1:]))
    assert (outcome.fork_tokens, outcome.verdicts, heard) == (200, 1, [(0.0, 200)])
    met = run_search(recording(3.0, gpu_s=95.0), replace(PLAIN, evaluators=2), parse_termination("speedup:2.5"), [100])
    assert (met.seconds, met.ended_by) == (pytest.approx(115), "reasoning"), "its verdict had come in the answer's"
    assert met.accepted is not None
    assert met.accepted.hash == "f1"


def test_a_base_that_answers_what_a_fork_wrote_is_not_judged_twice() -> None:
    same = recording(1.5)
    same = replace(same, final=same.forks[0])
    outcome = run_search(same, PLAIN, parse_termination("none"), [100])
    assert outcome.seconds == pytest.approx(110)
    assert (outcome.verdicts, outcome.correct, outcome.accepted and outcome.accepted.hash) == (1, 1, "f1")


def test_the_oracle_makes_only_the_forks_it_needs() -> None:
    assert oracle_seconds(recording(1.0, None, 3.0), PLAIN, parse_termination("speedup:2")) == pytest.approx(
        30 + 10 + 5
    )
    assert oracle_seconds(recording(1.0, None), PLAIN, parse_termination("speedup:2")) is None
    assert oracle_seconds(recording(1.1, 1.0, 1.0, 1.0), PLAIN, parse_termination("plateau:3")) == pytest.approx(55)


@pytest.mark.parametrize("points", [[], [50], [100, 200], list(range(10, 1000, 10))])
def test_no_policy_beats_the_oracle(points: list[int]) -> None:
    for speeds in [(1.0, 3.0), (None, None, 4.0), (1.2, 1.3, 0.5, 2.5)]:
        criterion = parse_termination("speedup:2")
        ideal = oracle_seconds(recording(*speeds), PLAIN, criterion)
        assert ideal is not None
        assert run_search(recording(*speeds), PLAIN, criterion, points).seconds >= ideal - 1e-6


def test_the_command_on_the_bundled_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, figure = tmp_path / "r.json", tmp_path / "p.png"
    arguments = ["--traces", str(BUNDLED), "--assume-service", "20", "5", "--json", str(report), "--plot", str(figure)]
    assert policies.main([*arguments, "--policies", "every:400", "draft", "adaptive", "--tokens-per-s", "60"]) == 0
    data = json.loads(report.read_text())
    assert data["schema"] == "specgen.policies/1"
    assert {"machine", "command", "commit", "seed"} <= set(data)
    fields = {
        "trace",
        "policy",
        "criterion",
        "tokens_per_s",
        "gain",
        "oracle_gain",
        "accepted_over_final",
        "forks",
        "fork_tokens",
    }
    assert all(fields <= set(row) for row in data["rows"])
    assert len(data["rows"]) == 3 * len(policies.CRITERIA)
    rows = {(row["policy"], row["criterion"]): row for row in data["rows"]}
    target = rows["every:400", "speedup:1.5"]
    assert 1.0 < target["gain"] <= target["oracle_gain"]
    assert target["service"] == "assumed"
    assert target["accepted_over_final"] == pytest.approx(2.23 / 4.89)
    assert rows["draft", "speedup:1.5"]["forks"] == 0
    assert rows["every:400", "none"]["gain"] == 1.0
    assert rows["every:400", "none"]["time_over_sequential"] > 1.0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "r.json", "r.md"]
    assert "every:400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--traces", "absent"], "no such folder"),
        (["--traces", str(BUNDLED)], "no iteration is scored"),
        (["--traces", str(BUNDLED), "--scores", "absent.json"], "--scores absent.json"),
        (["--traces", str(BUNDLED), "--evaluators", "0"], "at least 1"),
        (["--traces", str(BUNDLED), "--tokens-per-s", "0"], "above 0"),
        (["--traces", str(BUNDLED), "--policies", "often"], "--policies='often'"),
        (["--traces", str(BUNDLED), "--assume-service", "1", "1", "--criteria", "soon"], "--criteria='soon'"),
        (["--traces", str(BUNDLED), "--assume-service", "1", "1", "--criteria", "final:x"], "final:0.9"),
        (["--traces", str(BUNDLED), "--json", "absent/r.json"], "make it first"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert policies.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unscored_iteration_is_left_out_visibly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Path(shutil.copytree(BUNDLED / "cpu_row_softmax", tmp_path / "cpu_row_softmax"))
    shutil.copytree(task / "iter-1", task / "iter-2")
    (task / "iter-2" / "measured.json").unlink()
    arguments = [
        "--traces",
        str(task),
        "--assume-service",
        "1",
        "1",
        "--policies",
        "every:400",
        "--criteria",
        "correct",
    ]
    assert policies.main(arguments) == 0
    assert "left out: " in (out := capsys.readouterr().out)
    assert "iter-2/fork-1.md has no score" in out


def test_adaptive_on_the_shared_gpu_traces() -> None:
    """At 60 tokens/s: >= 85 % of the oracle's gain and >= 0.95 of the best fixed policy's at each criterion."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared traces at {SHARED} (set SPECGEN_TRACES)")
    scores = ["--scores", str(SHARED / "scores.json"), "--service-times"]
    options = policies.parse_arguments(["--traces", str(SHARED / "ours"), str(SHARED / "glm51"), *scores])
    subjects, _ = policies.collect(options)
    study, machine = policies.Study(subjects, policies.adaptive.Costs()), Machine(60.0)
    assert len(subjects) == 10
    for spec in ("speedup:1.5", "final:0.9", "plateau:3"):
        rows = [
            study.row(policy, index, machine, spec)
            for policy in ("every:400", "paragraph", "adaptive")
            for index in range(len(subjects))
        ]
        lines = {line["policy"]: line for line in policies.summarise(rows)}
        assert lines["adaptive"]["share_of_oracle"] >= 0.85
        assert lines["adaptive"]["gain"] >= 0.95 * max(lines["every:400"]["gain"], lines["paragraph"]["gain"])
        assert lines["adaptive"]["oracle_gain"] == pytest.approx(
            {"speedup:1.5": 3.1, "final:0.9": 2.07, "plateau:3": 1.25}[spec], abs=0.02
        )


def test_entropy_is_refused_since_recordings_have_no_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert policies.main(["--traces", "x", "--policies", "every:400 + entropy:1:min=200"]) == 2
    assert "recordings have no distribution" in capsys.readouterr().err
