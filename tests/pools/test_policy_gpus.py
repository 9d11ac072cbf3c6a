"""The policy's GPUs: who is idle, who may switch, and that an unknown one is said so."""

from __future__ import annotations

import pytest

from specgen_engine.pools.policy import NEVER, Role
from specgen_engine.pools.policy_gpus import GpuSet

V, P = Role.VALIDATE, Role.PROFILE


def gpus(*roles: Role) -> GpuSet:
    made = GpuSet(dwell_s=2.0)
    for index, role in enumerate(roles):
        made.add(index, role, NEVER, idle=True)
    return made


def test_one_that_rests_may_switch_once_its_dwell_is_over() -> None:
    pool = gpus(V)
    pool.wake(0.0)
    assert list(pool.movable[V]) == [0]
    assert pool.occupy(0, P, 10.0), "it has to switch"
    pool.rest(0)
    assert pool.next_wake() == 12.0
    pool.wake(11.9)
    assert not pool.movable[P]
    pool.wake(12.0)
    assert pool.movable_view(P)[:3] == (0, P, 10.0)
    pool.check_integrity()


def test_one_that_works_again_is_not_movable_when_its_old_dwell_ends() -> None:
    pool = gpus(V)
    pool.wake(0.0)
    pool.occupy(0, P, 10.0)
    pool.rest(0)
    assert not pool.occupy(0, P, 11.0)
    pool.wake(20.0)
    assert not pool.movable[P]
    pool.rest(0)
    pool.wake(20.0)
    pool.occupy(0, V, 21.0)
    pool.rest(0)
    pool.occupy(0, P, 22.0)
    pool.rest(0)
    pool.wake(23.0)
    assert not pool.movable[P], "its dwell of before ends, that of its latest switch does not"
    pool.check_integrity()


def test_counts_follow_a_switch_that_prepares_until_it_has_arrived_or_is_lost() -> None:
    pool = gpus(V, V)
    for index in (0, 1):
        pool.come(index, P, 1.0)
    assert (pool.counts, pool.coming) == ({V: 0, P: 2}, {V: 0, P: 2})
    pool.rest(0)
    assert (pool.coming[P], list(pool.idle[P])) == (1, [0])
    assert pool.remove(1).role is P
    assert (pool.counts[P], pool.coming[P], len(pool)) == (1, 0, 1)
    pool.check_integrity()


def test_the_one_that_rested_last_comes_first() -> None:
    pool = gpus(V, V, P, V)
    pool.occupy(0, V, 1.0)
    pool.rest(0)
    assert pool.rested_last(V, 2) == [0, 3]
    assert pool.rested_last(V, 9) == [0, 3, 1]


def test_unknown_and_known_ones_are_named() -> None:
    pool = gpus(V)
    with pytest.raises(ValueError, match=r"gpu=7: it is not in the pool \(it has \[0\]\)"):
        pool.rest(7)
    with pytest.raises(ValueError, match="gpu=0: it is in the pool already"):
        pool.add(0, P, NEVER, idle=True)
    assert pool.roles() == {0: V}


def test_a_wrong_count_is_found() -> None:
    pool = gpus(V, P)
    pool.counts[V] = 2
    with pytest.raises(AssertionError, match="2 GPUs counted, 1 there"):
        pool.check_integrity()
