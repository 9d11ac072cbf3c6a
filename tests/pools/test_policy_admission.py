"""Which forks would be judged in time: admission, and the time that a base's own answer leaves to late candidates."""

from __future__ import annotations

import pytest

from specgen_engine.pools.policy import admit, late_s, late_window_s
from tests.pools.test_policy import load


def test_admission_counts_the_forks_that_are_judged_in_time() -> None:
    idle = load(0, gpus=2), load(0, gpus=2)
    assert admit(8, 100.0, *idle, compile_s=1.0, generate_s=10.0).forks == 8
    assert admit(8, 21.0, *idle, compile_s=1.0, generate_s=10.0).forks == 1
    assert admit(8, 26.0, *idle, compile_s=1.0, generate_s=10.0).forks == 3
    late = admit(8, 100.0, load(100, gpus=2), load(0, gpus=2), compile_s=1.0, generate_s=10.0)
    assert (late.forks, late.feedback_s) == (0, 137.5)
    assert late.reason == "written in 10.0 s, feedback in 137.5 s, 100.0 s of reasoning are left"
    assert admit(8, 100.0, load(gpus=0), load(gpus=0), compile_s=1.0, generate_s=1.0).reason == "no evaluator GPU"


def test_admission_counts_what_runs_and_what_is_coming_but_an_idle_gpu_waits_for_nobody() -> None:
    """Services take 5 s; two GPUs, one of them idle: the next candidate finds it, one more waits for half of both."""
    half_idle = load(0, gpus=2, idle=1), load(0, gpus=0)
    assert admit(1, 5.0, *half_idle).feedback_s == admit(1, 100.0, *half_idle).feedback_s == 10.0
    assert admit(1, 100.0, *half_idle, coming=1).feedback_s == (2.5 + 10.0) / 2 + 10.0
    assert admit(1, 100.0, load(0, gpus=2), load(0, gpus=0), coming=3).feedback_s == (5.0 + 30.0) / 2 + 10.0
    assert [admit(1, 1.0, load(0, gpus=2, idle=idle), load(0, gpus=0), coming=coming).idle for idle, coming in
            ((2, 0), (2, 1), (1, 0))] == [True, False, False]  # fmt: skip


def test_admission_heeds_the_grace_after_a_reasoning_but_a_fork_must_be_written_before_its_end() -> None:
    idle = load(0, gpus=2, idle=2), load(0, gpus=0)
    assert admit(1, 4.0, *idle).forks == 0
    assert admit(1, 4.0, *idle, grace_s=6.0).forks == 1
    assert admit(1, 4.0, *idle, grace_s=5.9).forks == 0
    unwritten = admit(1, 4.0, *idle, generate_s=4.5, grace_s=600.0, elapsed_s=1.5)
    assert (unwritten.forks, unwritten.reason) == (
        0, "written in 4.5 s, feedback in 14.5 s, 4.0 s of reasoning are left, 15.0 s after it count",
    )  # fmt: skip


@pytest.mark.parametrize("left_s", [float("inf"), float("nan")])
@pytest.mark.parametrize("gpus", [0, 2])
def test_admission_without_a_known_end_takes_all(left_s: float, gpus: int) -> None:
    assert admit(4, left_s, load(50, gpus=gpus), load(50, gpus=0), generate_s=float("inf")).forks == 4


def test_late_candidates_get_the_grace_until_the_own_answer_is_right_and_then_a_fortieth_of_the_time() -> None:
    assert late_s(30.0, 0.0, 90.0, own_right=False) == 30.0
    assert late_s(30.0, 12.0, 90.0, own_right=False) == 18.0
    assert late_s(30.0, 12.0, 90.0, own_right=True) == 2.25
    assert late_s(30.0, 29.0, 90.0, own_right=True) == 1.0, "never longer than without"
    assert late_s(30.0, 40.0, 90.0, own_right=True) == late_s(30.0, 40.0, 90.0, own_right=False) == 0.0


def test_the_window_after_a_reasoning_is_what_a_right_answer_leaves() -> None:
    assert late_window_s(0.0, 100.0, 10.0, 5.0) == 0.0, "a stream leaves none"
    assert late_window_s(30.0, 85.0, 10.0, 5.0) == 10.0 + 5.0 + 2.5
    assert late_window_s(30.0, 85.0, 10.0, 29.0) == 10.0 + 29.0 + 1.0
    assert late_window_s(30.0, 85.0, 10.0, 60.0) == 10.0 + 30.0, "others are given up before it is judged"


def test_admission_counts_the_window_and_not_the_whole_grace() -> None:
    """Four GPUs, ten candidates wait: feedback in 25 s. A right answer leaves 5 s of writing, 10 of judging and 2.5."""
    busy = load(10, gpus=2), load(0, gpus=2)
    fork = {"generate_s": 5.0, "grace_s": 60.0}
    assert [admit(1, left, *busy, elapsed_s=85.0 - left, **fork).forks for left in (7.0, 8.0)] == [0, 1]
    assert admit(1, 7.0, *busy, elapsed_s=78.0, **fork).feedback_s == 25.0
    several = load(0, gpus=4, idle=4), load(0, gpus=0)
    several_in_time = admit(8, 4.0, *several, elapsed_s=86.0, grace_s=60.0)
    assert several_in_time.forks == 1 + int((4.0 + 10.0 + 2.5 - 10.0) / 2.5)
