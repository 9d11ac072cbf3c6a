"""Criteria end a reasoning on correct candidates only, and the plateau never on the first one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller.termination import DEFAULT, Scored, best, parse_termination
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


def test_the_default_is_the_plateau_and_never_takes_the_first_correct() -> None:
    assert DEFAULT == "plateau:3"
    assert parse_termination(DEFAULT).decide(search(50.0)) is None


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
    ],
)
def test_a_bad_spec_is_one_error_with_field_value_and_remedy(spec: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as caught:
        parse_termination(spec, field="specgen.termination")
    assert str(caught.value).startswith(f"specgen.termination={spec!r}: ")


@pytest.mark.parametrize("spec", ["correct", "speedup:1.5", "best_of:4", "plateau:3", "none"])
def test_a_criterion_knows_its_spec(spec: str) -> None:
    assert parse_termination(spec).spec == spec
