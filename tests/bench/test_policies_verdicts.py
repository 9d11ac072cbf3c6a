"""The study of verdicts per token: its two readings, conditions and command, on made-up and bundled recordings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import policies_verdicts
from bench.policies_verdicts import EachItsOwn, Searches, condition_of, per_1000, searched, study
from bench.recordings import Subject, UsageError
from bench.virtual_time import Answer, Machine, Outcome, Recording
from specgen_engine.controller.termination import Scored
from specgen_engine.evaluation.base import Status
from specgen_engine.replay.trace import BUNDLED

MACHINE = Machine(60.0, fork_slowdown=0.0, prefill_s=0.0)
SAID = {"fork-1": tuple(range(400)), "final": tuple(range(1_000, 1_400))}


def answer(label: str, speedup: float = 1.2, compile_s: float = 1.0) -> Answer:
    return Answer(label, label, 400, Status.CORRECT, speedup, compile_s, 1.0)


def subject(final_compile_s: float = 1.0) -> Subject:
    final = answer("final", 2.0, final_compile_s)
    return Subject(Recording("t", "f", 8_000, (0,), (answer("fork-1"),), final), ("x",) * 8_000, "", {})


def outcome(seconds: float, speedup: float, base: int, forks: int, correct: int) -> Outcome:
    accepted = Scored("h", Status.CORRECT, speedup, "fork", 0)
    return Outcome(seconds, "criterion", accepted, 1, forks, correct, base, correct=correct)


@pytest.mark.parametrize(
    ("worth", "own", "correct", "fork_tokens"),
    [
        (None, False, 2, 4 * 400),  # four forks and the final: the answer of the one mark is one verdict
        (None, True, 5, 4 * 400),
        (0.0, False, 2, 400 + 64 * 3),
        (0.0, True, 5, 4 * 400),  # nothing repeats
    ],
)
def test_replayed_forks_repeat_and_those_that_say_their_own_do_not(
    worth: float | None, own: bool, correct: int, fork_tokens: int
) -> None:
    played = searched([subject()], [SAID], "every:1900", worth, own, MACHINE, target=1.5)
    assert (played.outcomes[0].correct, played.outcomes[0].forks) == (correct, 4)
    assert played.outcomes[0].fork_tokens == pytest.approx(fork_tokens, abs=2)
    assert (played.alone[0].correct, played.alone[0].fork_tokens) == (1, 0)


def test_a_fork_before_the_first_mark_has_no_answer_in_either_reading() -> None:
    late = EachItsOwn(Recording("t", "f", 8_000, (100,), (answer("fork-1"),), answer("final")))
    assert late.answer_at(50) is None
    one, two = late.answer_at(100), late.answer_at(101)
    assert one is not None
    assert two is not None
    assert one.hash != two.hash
    assert (one.tokens, one.speedup) == (two.tokens, two.speedup) == (400, 1.2)


def test_figures_are_sums_over_tokens_and_means_of_ratios() -> None:
    alone = [outcome(100.0, 2.0, 1_000, 0, 1), outcome(100.0, 2.0, 3_000, 0, 1)]
    both = Searches([outcome(25.0, 1.6, 500, 500, 3), outcome(50.0, 1.4, 1_000, 0, 1)], alone)
    assert per_1000(both.outcomes) == pytest.approx(2.0)
    assert both.over_sequential() == pytest.approx(4.0)
    assert both.gain(1.5) == pytest.approx(2.0), "the second misses the target: 1.0"
    assert both.of([False, True]).over_sequential() == pytest.approx(1.0 / (1 / 3))


def test_a_condition_says_how_long_cuda_takes_to_compile() -> None:
    one = condition_of("138:64")
    assert (one.rate, one.cuda_s) == (138.0, 64.0)
    assert one.subject(subject(30.0)).recording.final.compile_s == 64.0
    assert one.subject(subject(3.0)).recording.final.compile_s == 3.0, "that is Triton"
    assert condition_of("60").subject(subject(30.0)).recording.final.compile_s == 30.0
    for wrong in ("fast", "0", "60:0", "60:-1", "60:x"):
        with pytest.raises(UsageError, match=f"--conditions '{wrong}'"):
            condition_of(wrong)


def test_every_row_is_over_the_sequential_of_its_own_condition() -> None:
    rows = study([subject()], [SAID], [condition_of("60"), condition_of("600")], ["every:1900"], 1.5)
    assert [(row["condition"], row["end_repeats"]) for row in rows] == [
        (name, worth) for name in ("60", "600") for worth in policies_verdicts.WORTHS
    ]
    for row in rows:
        one = row["replayed"]
        assert row["sequential_per_1000"] == pytest.approx(1_000 / 8_400)
        assert one["over_sequential"] == pytest.approx(one["correct_per_1000_tokens"] / row["sequential_per_1000"])
        assert one["by_group"] == {"f": one["over_sequential"]}


def test_the_command_on_the_bundled_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "scores.json"
    trace = BUNDLED / "cpu_row_softmax"
    labels = [path.stem for path in (trace / "iter-1").glob("fork-*.md")] + ["final"]
    row = {"status": "correct", "speedup": 1.2, "import_s": 1.0, "check_s": 0.5, "time_s": 0.5}
    names = [f"{trace.parent.name}/cpu_row_softmax/iter-1/{label}.md" for label in labels]
    scores.write_text(json.dumps({"answers": dict.fromkeys(names, row)}))
    arguments = ["--traces", str(trace), "--scores", str(scores), "--triggers", "every:300", "--conditions", "60"]
    assert policies_verdicts.main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"machine", "command", "commit", "seed"} <= set(report)
    assert len(report["rows"]) == len(policies_verdicts.WORTHS)
    assert "`every:300`" in (tmp_path / "r.md").read_text()
    assert "Simulated" in capsys.readouterr().out
    for more, says in (
        (["--leave-out", "ours/none"], "--leave-out 'ours/none'"),
        (["--leave-out", f"{trace.parent.name}/cpu_row_softmax"], "no trace is left"),
        (["--target", "0"], "--target 0"),
        (["--json", str(tmp_path / "absent" / "r.json")], "make it first"),
    ):
        assert policies_verdicts.main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
