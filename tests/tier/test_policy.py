"""What is kept, written and fetched: pure decisions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.tier.policy import (
    Destination,
    Segment,
    Source,
    Waiting,
    destination,
    eviction_rank,
    expected_reuse,
    prefetches,
)

SEGMENTS = st.builds(Segment, st.sampled_from(Source), st.booleans(), st.integers(0, 9), st.floats(0, 1e6))


@given(dead=SEGMENTS, seconds=st.floats(0, 1e6), hits=st.integers(0, 9))
def test_fork_points_of_live_searches_outrank_everything_else(dead: Segment, seconds: float, hits: int) -> None:
    live = Segment(Source.BASE, True, hits, seconds)
    if dead.live and dead.source is Source.BASE:
        return
    assert eviction_rank(dead) < eviction_rank(live)
    assert expected_reuse(dead) < expected_reuse(live)


@given(SEGMENTS, SEGMENTS)
def test_among_equals_the_least_recently_used_goes_first(one: Segment, other: Segment) -> None:
    other = other._replace(source=one.source, live=one.live)
    assert (eviction_rank(one) < eviction_rank(other)) == (one.last_used < other.last_used)


def test_a_forks_answer_is_the_first_to_go() -> None:
    ranks = {
        (source, live): eviction_rank(Segment(source, live, 0, 1.0))
        for source, live in itertools.product(Source, (False, True))
    }
    assert min(ranks, key=lambda key: ranks[key]) == (Source.FORK, False)
    assert ranks[Source.FORK, True] < ranks[Source.BASE, False] < ranks[Source.PLAIN, False] < ranks[Source.BASE, True]


@pytest.mark.parametrize(
    ("source", "finished", "expected"),
    [
        (Source.BASE, False, Destination.PEER),
        (Source.BASE, True, Destination.DROP),
        (Source.FORK, False, Destination.DROP),
        (Source.FORK, True, Destination.DROP),
        (Source.PLAIN, True, Destination.PEER),
    ],
)
def test_what_is_written_where_it_is_published(source: Source, finished: bool, expected: Destination) -> None:
    assert destination(source, finished) is expected


WAITING = st.lists(
    st.builds(Waiting, st.uuids().map(str), st.booleans(), st.integers(0, 4000)), max_size=8, unique_by=lambda w: w.rid
)


@given(WAITING, st.integers(0, 8000))
def test_prefetches_fit_into_what_is_free(waiting: list[Waiting], free: int) -> None:
    chosen = prefetches(waiting, free)
    by_rid = {one.rid: one for one in waiting}
    assert len(set(chosen)) == len(chosen)
    assert sum(by_rid[rid].tokens for rid in chosen) <= free
    assert all(by_rid[rid].tokens >= 64 for rid in chosen)
    kinds = [by_rid[rid].is_fork for rid in chosen]
    assert kinds == sorted(kinds)


def test_a_prefix_that_does_not_fit_lets_a_smaller_one_pass() -> None:
    queue = [Waiting("big", False, 900), Waiting("fork", True, 200), Waiting("small", False, 300)]
    assert prefetches(queue, 520) == ["small", "fork"]
