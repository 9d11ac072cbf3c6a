"""Which builds begin: worked-out cases of the pure functions, random histories of the pool's state."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgen_engine.pools.policy import JobView, Role
from specgen_engine.pools.policy_builds import BuildLoad, build_key, builds_at_once, builds_beside
from specgen_engine.pools.policy_state import PoolState

ALONE = BuildLoad(newest=0, under_way=0)


def job(name: str, search: str = "s", at: float = 0.0, builds: str = "cuda", **more) -> JobView:
    return JobView(name, search, Role.VALIDATE, at, 1.0, builds=builds, **more)


def pool(slots: int, build_slots: int | None, *searches: str) -> PoolState:
    state = PoolState(build_slots=build_slots)
    for search in searches or ("s",):
        state.add_search(search)
    for index in range(slots):
        state.add_gpu(index, Role.VALIDATE)
    return state


def begun(state: PoolState, now: float = 0.0) -> tuple[list[str], list[str]]:
    """(builds, jobs at slots) that begin now."""
    decision = state.decide(now)
    return [one.id for one in decision.builds], [one.job.id for one in decision.assignments if one.job]


@pytest.mark.parametrize(("cores", "builds"), [(1, 1), (2, 1), (8, 2), (16, 4), (32, 9), (64, 19)])
def test_builds_leave_a_quarter_of_the_cores(cores: int, builds: int) -> None:
    assert builds_at_once(cores) == builds
    assert builds == 1 or builds * 2.5 <= 0.75 * cores


@pytest.mark.parametrize(
    ("slots", "quick_per_s", "expected"), [(6, 0.0, 6), (6, 0.1, 4), (3, 0.1, 2), (2, 0.1, 1), (1, 0.1, 1), (0, 0.1, 1)]
)
def test_slots_that_build_keep_a_third_for_quick_ones_that_come(slots: int, quick_per_s: float, expected: int) -> None:
    assert builds_beside(slots, quick_per_s) == expected


def test_builds_begin_with_what_ends_a_reasoning_soonest() -> None:
    base = build_key(job("base", at=99.0, could_end=True), BuildLoad(5, 3), 60.0)
    first = build_key(job("first", at=10.0, fork=5), BuildLoad(5, 0), 60.0)
    short = build_key(job("short", at=10.0), ALONE, 5.0)
    younger = build_key(job("younger", at=11.0), ALONE, 60.0)
    second = build_key(job("second", at=10.0, fork=5), BuildLoad(5, 1), 60.0)
    superseded = build_key(job("superseded", at=10.0, fork=4), BuildLoad(5, 1), 60.0)
    assert sorted([superseded, second, younger, short, first, base]) == [
        base,
        short,
        first,
        younger,
        second,
        superseded,
    ]
    assert build_key(job("old", at=-200.0, fork=4), BuildLoad(5, 1), 60.0) < first


def test_a_candidate_takes_a_slot_once_it_is_built() -> None:
    state = pool(1, 1)
    state.submit(job("long"), 0.0)
    state.submit(job("later", at=1.0), 1.0)
    assert begun(state, 1.0) == (["long"], [])
    state.submit(job("quick", at=2.0, builds=""), 2.0)
    assert begun(state, 2.0) == ([], ["quick"])
    assert state.built("long", 60.0) is not None
    assert begun(state, 61.0) == (["later"], [])
    state.release(0, 62.0, 1.0)
    assert begun(state, 62.0) == ([], ["long"])
    assert state.builds.expected_s("cuda") == 60.0
    state.check_integrity()


def test_a_newer_fork_of_a_search_is_built_before_those_it_supersedes() -> None:
    state = pool(1, 1)
    for number in range(3):
        state.submit(job(f"fork{number}", at=float(number), fork=number), float(number))
    assert begun(state, 3.0) == (["fork2"], [])
    state.built("fork2", 50.0)
    assert begun(state, 53.0)[0] == ["fork1"]


def test_a_cancelled_build_keeps_its_place_until_it_has_ended_and_then_frees_it() -> None:
    state = pool(1, 1, "one", "two")
    state.submit(job("long", "one"), 0.0)
    state.submit(job("next", "two"), 0.0)
    assert begun(state) == (["long"], [])
    assert state.cancel_search("one").queued == ("long",)
    state.end_search("one")
    assert begun(state) == ([], [])
    assert state.built("long", None) is None
    assert begun(state) == (["next"], [])
    state.check_integrity()


def test_a_deadline_passes_in_the_line_of_builds_too() -> None:
    state = pool(1, 1)
    state.submit(job("long"), 0.0)
    state.submit(job("late", deadline=5.0), 0.0)
    state.decide(0.0)
    assert [one.id for one in state.decide(6.0).expired] == ["late"]
    state.check_integrity()


def test_slots_that_build_keep_some_for_quick_ones() -> None:
    state = pool(6, None)
    for number in range(8):
        state.submit(job(f"b{number}", at=float(number)), float(number))
    state.submit(job("quick", at=8.0, builds=""), 8.0)
    assert sorted(begun(state, 8.0)[1]) == ["b0", "b1", "b2", "b3", "quick"]
    state.release(5, 70.0, 1.0)
    state.remove_gpu(4)
    state.check_integrity()
    assert state.builds.free(5, 0.1) == 1
    assert len(begun(state, 70.0)[1]) == 1
    only = pool(6, None)
    for number in range(8):
        only.submit(job(f"b{number}"), 0.0)
    assert len(begun(only)[1]) == 6


def test_without_builders_any_more_their_jobs_are_built_by_slots() -> None:
    state = pool(2, 2)
    for number in range(3):
        state.submit(job(f"b{number}"), 0.0)
    assert len(begun(state)[0]) == 2
    state.lose_builders()
    assert len(begun(state)[1]) == 2
    state.check_integrity()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), build_slots=st.sampled_from([None, 1, 3]), slots=st.integers(1, 4))
def test_whatever_happens_counts_agree_limits_hold_and_every_job_gets_a_slot(seed, build_slots, slots) -> None:
    draw = random.Random(seed)
    state = pool(slots, build_slots, "s0", "s1")
    building: set[str] = set()
    at_slots: dict[int, str] = {}
    open_jobs: set[str] = set()
    served: set[str] = set()
    cancelled: set[str] = set()
    now = 0.0

    def decide() -> None:
        decision = state.decide(now)
        building.update(one.id for one in decision.builds)
        assert len(building) <= (build_slots or 0)
        for one in decision.assignments:
            assert one.job is not None
            assert one.job.id not in building
            at_slots[one.gpu] = one.job.id
            served.add(one.job.id)
        state.check_integrity()

    def end_something() -> None:
        if building and (not at_slots or draw.random() < 0.5):
            name = draw.choice(sorted(building))
            building.discard(name)
            state.built(name, draw.choice([None, 30.0]))
        elif at_slots:
            index = draw.choice(sorted(at_slots))
            open_jobs.discard(at_slots.pop(index))
            state.release(index, now, 1.0)

    for number in range(60):
        now += draw.random()
        if draw.random() < 0.5:
            name = f"j{number}"
            kind = draw.choice(["", "cuda", "cpp_inline"])
            state.submit(job(name, f"s{number % 2}", now, kind, fork=number, could_end=draw.random() < 0.2), now)
            open_jobs.add(name)
        elif draw.random() < 0.3 and open_jobs:
            name = draw.choice(sorted(open_jobs))
            if state.cancel(name).queued:
                open_jobs.discard(name)
                cancelled.add(name)
        else:
            end_something()
        decide()
    while open_jobs:
        now += 1.0
        end_something()
        decide()
    assert not cancelled & served - set(at_slots.values())
    assert not list(state.builds)
