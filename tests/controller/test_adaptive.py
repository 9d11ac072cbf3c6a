"""The adaptive policy forks more densely where reasoning yields kernels, and its state survives a restart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller.adaptive import (
    MAX_GAP,
    MIN_GAP,
    Costs,
    Family,
    View,
    affordable,
    dumps,
    expected_tokens,
    loads,
    observed,
    spacing,
    wants_fork,
)

COSTS = Costs()


def after(*forks: tuple[int, float, float, int]) -> Family:
    family = Family()
    for fork in forks:
        family = observed(family, *fork)
    return family


def test_misses_widen_the_spacing_and_hits_narrow_it() -> None:
    plain = spacing(Family(), False, COSTS)
    assert spacing(after(*[(500, 0.0, 0.0, 1500)] * 20), False, COSTS) > 1.5 * plain
    assert spacing(after(*[(500, 0.0, 1.2, 1500)] * 20), False, COSTS) < plain


def test_before_and_after_the_first_correct_kernel_are_learnt_apart() -> None:
    family = after(*[(400, 2.0, 2.0, 1500)] * 30)
    assert spacing(family, True, COSTS) > spacing(Family(), True, COSTS)
    assert spacing(family, False, COSTS) == pytest.approx(spacing(Family(), False, COSTS))


def test_only_a_gain_of_five_percent_counts() -> None:
    assert after((100, 2.0, 2.09, 10)).better == Family().better
    assert after((100, 2.0, 2.1, 10)).better == Family().better + 1


def test_dearer_forks_are_made_further_apart() -> None:
    assert spacing(Family(fork_tokens=6_000), False, COSTS) == pytest.approx(2 * spacing(Family(), False, COSTS))
    assert spacing(Family(), False, Costs(slowdown=0.07)) == pytest.approx(2 * spacing(Family(), False, COSTS))


def view(gap: int, **more: float) -> View:
    return View(gap, best=0.0, position=100_000)._replace(**more)


def test_a_fork_waits_for_its_distance_and_for_the_evaluators() -> None:
    gap = int(spacing(Family(), False, COSTS)) + 1
    assert wants_fork(Family(), view(gap), 0, 3, COSTS)
    assert not wants_fork(Family(), view(gap - 2), 0, 3, COSTS)
    assert not wants_fork(Family(), view(gap, best=1.0), 0, 3, COSTS)
    assert wants_fork(Family(), view(gap), 6, 3, COSTS)
    assert not wants_fork(Family(), view(gap), 7, 3, COSTS)


def test_what_forks_take_from_their_base_is_bounded() -> None:
    """1 % of 1,500 tokens is 15; 2.5 % of 1,000 and what is reasoned may be taken."""
    assert affordable(Family(), view(0, position=0), COSTS)
    assert not affordable(Family(), view(0, position=0, forks=1, fork_tokens=1_500), COSTS)
    assert affordable(Family(), view(0, position=200, forks=1, fork_tokens=1_500), COSTS)
    assert not affordable(Family(), view(0, position=200, forks=1, fork_tokens=1_500, in_flight=1), COSTS)
    assert affordable(Family(), view(0, position=500, forks=1, fork_tokens=1_500, in_flight=1), COSTS)


def test_a_search_whose_answers_grow_expects_the_next_one_to_be_long() -> None:
    assert expected_tokens(Family(), view(0)) == 1_500
    assert expected_tokens(Family(), view(0, forks=8, fork_tokens=800)) == 1_500
    assert expected_tokens(Family(), view(0, forks=8, fork_tokens=32_000)) == 3_500


@given(st.integers(0, 60_000), st.integers(1, 6_000), st.floats(0.001, 0.1))
def test_forks_at_every_point_it_allows_stay_within_the_bound(tokens: int, answer: int, slowdown: float) -> None:
    costs, family, spent, forks = Costs(slowdown=slowdown), Family(), 0, 0
    for position in range(0, tokens, 200):
        if affordable(family, View(200, 0.0, position, forks, spent), costs):
            spent, forks = spent + answer, forks + 1
            family = observed(family, 200, 0.0, 0.0, answer)
    taken = slowdown * max(0, spent - answer)  # the last one may be longer than any before
    assert taken <= costs.most_share * (tokens + costs.start_tokens)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(0, 100), st.floats(0, 100), st.integers(0, 10**6)), max_size=30
    ),
    st.booleans(),
)
def test_the_spacing_stays_in_its_range_whatever_was_seen(forks: list, has_correct: bool) -> None:
    family = after(*forks)
    assert MIN_GAP <= spacing(family, has_correct, COSTS) <= MAX_GAP
    assert loads(dumps({"a": family})) == {"a": family}


@pytest.mark.parametrize(
    "text", ["", "{}", '{"schema": "other", "families": {}}', dumps({"a": Family()}).replace("1.0", "-1")]
)
def test_a_state_that_is_not_ours_is_one_error_with_its_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=r"^state.json: not usable .*delete it to learn afresh$"):
        loads(text, "state.json")
