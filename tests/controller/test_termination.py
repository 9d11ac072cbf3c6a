"""Criteria end a reasoning on correct candidates only, and the plateau never on the first one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller.termination import (
    DEFAULT,
    Progress,
    Scored,
    best,
    expected_log_gain,
    parse_termination,
    watches_progress,
)
from specgen_engine.evaluation.base import Status


def search(*speeds: float | Status) -> list[Scored]:
    """Verdicts in order; a number is a correct candidate's speed-up."""
    return [
        Scored(f"h{order}", speed, None, "fork", order)
        if isinstance(speed, Status)
        else Scored(f"h{order}", Status.CORRECT, speed, "fork", order)
        for order, speed in enumerate(speeds)
    ]


def ends_at(spec: str, scored: list[Scored]) -> tuple[int, str] | None:
    """(verdicts seen, hash accepted) at the first decision while the verdicts come in one by one."""
    criterion = parse_termination(spec)
    for count in range(len(scored) + 1):
        decision = criterion.decide(scored[:count])
        if decision is not None:
            return count, decision.hash
    return None


W, E, C = Status.WRONG, Status.COMPILE_ERROR, Status.CANCELLED


@pytest.mark.parametrize(
    ("spec", "scored", "expected"),
    [
        ("correct", search(W, E, 0.3, 2.0), (3, "h2")),
        ("correct", search(W, E), None),
        ("speedup:1.5", search(1.49, W, 1.5), (3, "h2")),
        ("speedup:1.5", search(1.2, 1.4), None),
        ("speedup:0.5", search(0.6), (1, "h0")),
        ("best_of:4", search(W, 2.0, 1.0, E, 9.0), (4, "h1")),
        ("best_of:4", search(W, C, 2.0, E, 1.0), (5, "h2")),
        ("best_of:2", search(W, E, W, 0.2), (4, "h3")),
        ("plateau:3", search(2.0, 1.0, W, E), (4, "h0")),
        ("plateau:3", search(2.0, 1.0, C, W, E), (5, "h0")),
        ("plateau:3", search(0.9, 0.9, 0.9, 0.9, 0.9), None),
        ("plateau:3", search(0.9, W, E, 1.1, W, W), None),
        ("plateau:3", search(2.0, 1.0, 1.0, 2.2, 1.0, 1.0, 2.25), (7, "h6")),
        ("plateau:3", search(2.0, 2.06, 2.12, 2.1, 2.1, 2.1), (6, "h2")),
        ("plateau:1", search(1.2, W), (2, "h0")),
        ("none", search(1.2, 5.0, 90.0, W, W, W, W), None),
    ],
)
def test_when_a_criterion_ends_the_reasoning(spec: str, scored: list[Scored], expected: tuple[int, str] | None) -> None:
    assert ends_at(spec, scored) == expected


def test_verdicts_count_in_the_order_they_came() -> None:
    scored = search(W, 2.0, 1.0, 1.0, 1.0)
    assert parse_termination("correct").decide(scored[::-1]) == parse_termination("correct").decide(scored)
    assert parse_termination("plateau:3").decide(scored[::-1]) == parse_termination("plateau:3").decide(scored)


def test_the_default_weighs_gain_and_goes_on_early_after_the_first_correct() -> None:
    assert DEFAULT == "gain:0.3"
    first = [Scored("h", Status.CORRECT, 50.0, "fork", 0, at_token=4_000)]
    assert parse_termination(DEFAULT).decide(first, Progress(reasoning_tokens=4_100)) is None
    assert parse_termination("plateau:3").decide(first) is None


@given(
    st.sampled_from(["correct", "speedup:1.5", "best_of:2", "plateau:1", "none"]),
    st.lists(
        st.one_of(
            st.sampled_from([status for status in Status if status is not Status.CORRECT]),
            st.floats(0.01, 100),
        ),
        max_size=12,
    ),
)
def test_only_a_correct_candidate_is_ever_accepted(spec: str, speeds: list[float | Status]) -> None:
    scored = search(*speeds)
    decision = parse_termination(spec).decide(scored)
    if decision is not None:
        accepted = next(one for one in scored if one.hash == decision.hash)
        assert accepted.status is Status.CORRECT
        if spec != "correct":
            assert accepted == best(scored)


def test_a_wrong_candidate_with_a_speedup_and_a_broken_number_count_for_nothing() -> None:
    scored = [Scored("w", W, 9.0, "fork", 0), Scored("n", Status.CORRECT, math.nan, "fork", 1)]
    assert best(scored) is None
    assert parse_termination("correct").decide(scored) is None
    assert parse_termination("speedup:1").decide(scored) is None


def test_best_is_the_earlier_of_two_equals() -> None:
    top = best(search(1.0, 3.0, 3.0))
    assert top is not None
    assert top.hash == "h1"
    assert best([]) is None


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("", "use correct"),
        ("first", "use correct"),
        ("correct:1", "takes no argument"),
        ("none:", "takes no argument"),
        ("speedup", "speedup:1.5"),
        ("speedup:", "speedup:1.5"),
        ("speedup:0", "from 0.01"),
        ("speedup:-1", "from 0.01"),
        ("speedup:nan", "from 0.01"),
        ("speedup:inf", "from 0.01"),
        ("speedup:1e9", "to 100000"),
        ("best_of:0", "from 1"),
        ("best_of:2.5", "whole number"),
        ("plateau:0", "plateau:3"),
        ("plateau:x", "plateau:3"),
        ("roofline:1.1", "roofline:0.8"),
        ("gain:0", "gain:0.5"),
        ("budget:", "once each"),
        ("budget:tokens=0", "from 1 to"),
        ("budget:tokens=5,tokens=6", "once each"),
        ("budget:hours=5", "once each"),
        ("speedup:1.5|", "use correct"),
        ("speedup:1.5|none", "can't be joined"),
    ],
)
def test_a_bad_spec_is_one_error_with_field_value_and_remedy(spec: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as caught:
        parse_termination(spec, field="specgen.termination")
    assert str(caught.value).startswith(f"specgen.termination={spec!r}: ")


@pytest.mark.parametrize(
    "spec",
    [
        "correct", "speedup:1.5", "best_of:4", "plateau:3", "none", "roofline:0.8", "gain:0.5",
        "budget:seconds=600,tokens=20000,gpu_seconds=30", "speedup:1.5|plateau:3|budget:tokens=100",
    ],
)  # fmt: skip
def test_a_criterion_knows_its_spec(spec: str) -> None:
    assert parse_termination(spec).spec == spec


def test_roofline_takes_the_fastest_of_those_that_reach_the_share() -> None:
    near = Scored("near", Status.CORRECT, 2.0, "fork", 0, roofline=0.7)
    unknown = Scored("unknown", Status.CORRECT, 9.0, "fork", 1)
    there = Scored("there", Status.CORRECT, 3.0, "fork", 2, roofline=0.81)
    criterion = parse_termination("roofline:0.8")
    assert criterion.decide([near, unknown]) is None
    decision = criterion.decide([near, unknown, there])
    assert decision is not None
    assert decision.hash == "there"


@pytest.mark.parametrize("used", [Progress(seconds=60), Progress(tokens=500), Progress(evaluator_s=9)])
def test_a_budget_ends_with_the_best_and_never_without_a_correct_one(used: Progress) -> None:
    criterion = parse_termination("budget:seconds=60,tokens=500,gpu_seconds=9")
    assert criterion.decide(search(1.0, 2.0), Progress(59, 499, 499, 8.9)) is None
    assert criterion.decide(search(W, E), used) is None
    decision = criterion.decide(search(1.0, 2.0), used)
    assert decision is not None
    assert decision.hash == "h1"


def test_gain_goes_on_while_steps_come_and_ends_in_a_long_calm() -> None:
    criterion = parse_termination("gain:0.5")
    steps = [Scored(f"h{n}", Status.CORRECT, 1.5**n, "fork", n, at_token=1_000 * n) for n in range(1, 6)]
    assert criterion.decide(steps, Progress(reasoning_tokens=5_500)) is None
    decision = criterion.decide(steps[:1], Progress(reasoning_tokens=1_100))
    assert decision is not None  # the prior alone pays 0.11 at 1,100 tokens
    assert criterion.decide(search(0.9), Progress(reasoning_tokens=99_000)) is None
    late = criterion.decide(steps, Progress(reasoning_tokens=10**9))
    assert late is None  # steps in proportion to tokens: a constant rate never falls below its share
    assert expected_log_gain(steps, 20_000) < expected_log_gain(steps, 6_000)


def test_the_first_member_that_decides_wins() -> None:
    criterion = parse_termination("speedup:5|correct")
    decision = criterion.decide(search(1.2))
    assert decision is not None
    assert "first correct" in decision.reason
    decision = criterion.decide(search(1.2, 6.0))
    assert decision is not None
    assert decision.hash == "h1"


def test_who_watches_progress() -> None:
    assert watches_progress(parse_termination("plateau:3|budget:tokens=10"))
    assert not watches_progress(parse_termination("plateau:3|speedup:2"))
