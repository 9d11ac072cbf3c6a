"""The speculative class: pure decisions, checked over random loads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.scheduler.policy import (
    Fork,
    Limits,
    Load,
    admissible_forks,
    forks_in_the_way,
    forks_to_retract,
    keep_order,
)

searches = st.sampled_from(["a", "b", "c"])
loads = st.builds(
    Load,
    ordinary_waiting=st.integers(0, 2),
    ordinary_running=st.integers(0, 8),
    forks_running=st.lists(searches, max_size=8).map(tuple),
    pool_tokens=st.just(1000),
    free_tokens=st.integers(0, 1000),
    promised_tokens=st.integers(0, 1000),
)
limits = st.builds(
    Limits,
    batch_share=st.sampled_from([0.1, 0.5, 1.0]),
    headroom=st.sampled_from([0.0, 0.1]),
    per_search=st.integers(1, 4),
    total=st.integers(1, 8),
    max_running=st.just(16),
)
queues = st.lists(st.tuples(searches, st.integers(1, 400)), max_size=10).map(
    lambda rows: [Fork(f"{search}-{i}", search, tokens) for i, (search, tokens) in enumerate(rows)]
)


@given(loads, queues, limits)
def test_forks_never_pass_a_limit(load: Load, waiting: list[Fork], caps: Limits) -> None:
    admitted = admissible_forks(load, waiting, caps)
    by_rid = {fork.rid: fork for fork in waiting}
    if not admitted:
        return
    assert load.ordinary_waiting == 0
    running = len(load.forks_running) + len(admitted)
    assert running <= caps.total
    assert running <= max(1, caps.batch_share * caps.max_running)
    needed = sum(by_rid[rid].tokens for rid in admitted)
    assert needed + load.promised_tokens + caps.headroom * load.pool_tokens <= load.free_tokens + 1
    for search in "abc":
        mine = sum(by_rid[rid].search == search for rid in admitted)
        assert mine == 0 or mine + load.forks_running.count(search) <= caps.per_search


def test_a_fork_that_fits_is_admitted_in_order() -> None:
    load = Load(0, 1, (), 1000, 500, 100)
    caps = Limits(0.5, 0.0, 2, 8, 16)
    waiting = [Fork("big", "a", 900), Fork("one", "a", 100), Fork("two", "a", 100), Fork("three", "a", 100)]
    assert admissible_forks(load, waiting, caps) == ("one", "two")


def test_an_ordinary_request_that_waits_retracts_every_fork() -> None:
    load = Load(1, 1, ("a", "b"), 1000, 0, 0)
    assert forks_to_retract(load, ordinary_admitted=False) == 2
    assert forks_to_retract(load, ordinary_admitted=True) == 0
    assert forks_to_retract(load._replace(forks_running=()), ordinary_admitted=False) == 0
    assert forks_to_retract(load._replace(ordinary_waiting=0), ordinary_admitted=False) == 0


@given(st.permutations(range(6)), st.lists(st.booleans(), min_size=6, max_size=6))
def test_forks_are_retracted_first_and_the_rest_keeps_its_order(order: list[int], forks: list[bool]) -> None:
    kept = keep_order(order, forks)
    assert sorted(kept) == sorted(order)
    flags = [forks[i] for i in kept]
    assert flags == sorted(flags)
    assert [i for i in kept if not forks[i]] == [i for i in order if not forks[i]]


@given(loads, st.integers(0, 2000))
def test_forks_are_in_the_way_of_what_does_not_fit_beside_them(load: Load, asked: int) -> None:
    load = load._replace(asked_tokens=asked)
    fits = load.promised_tokens + asked <= load.free_tokens
    assert forks_in_the_way(load) == (bool(load.forks_running) and not fits)
