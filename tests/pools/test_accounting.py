"""GPU-seconds by search, stage and outcome, and busy shares, by worked-out cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.pools.accounting import Account, Outcome, Spent
from specgen_engine.pools.metrics import exposition


def account() -> Account:
    one = Account()
    one.join(0, 100.0)
    one.join(1, 150.0)
    one.record("a", "validate", Outcome.USEFUL, 0, 30.0)
    one.record("a", "profile", Outcome.SUPERSEDED, 0, 20.0)
    one.record("b", "validate", Outcome.CANCELLED, 1, 5.0)
    one.record("a", "validate", Outcome.USEFUL, 1, 1.0)
    return one


def test_seconds_add_up_by_search_stage_and_outcome() -> None:
    one = account()
    assert one.seconds[Spent("a", "validate", Outcome.USEFUL)] == 31.0
    assert one.by_search() == {"a": 51.0, "b": 5.0}
    assert one.by_outcome() == {Outcome.USEFUL: 31.0, Outcome.SUPERSEDED: 20.0, Outcome.CANCELLED: 5.0}
    assert one.total() == 56.0


def test_a_gpu_with_several_workers_is_busy_while_one_of_them_is() -> None:
    """Ends at 4, 5, 7 and 20 s: 0-4, 1-5, 6-7, and one that began at 3 s and spans them all but the first 3 s."""
    one = Account()
    one.join(0, 0.0)
    for search, seconds, ended in (("a", 4.0, 4.0), ("b", 4.0, 5.0), ("a", 1.0, 7.0)):
        one.record(search, "validate", Outcome.USEFUL, 0, seconds, ended)
    assert one.utilisation(10.0) == {0: pytest.approx(0.6)}
    one.record("b", "validate", Outcome.USEFUL, 0, 17.0, 20.0)
    assert one.utilisation(20.0) == {0: pytest.approx(1.0)}
    assert one.by_search() == {"a": 5.0, "b": 21.0}


def test_utilisation_counts_only_the_time_that_a_gpu_was_there() -> None:
    one = account()
    assert one.utilisation(200.0) == {0: 0.5, 1: pytest.approx(6 / 50)}
    one.leave(1, 160.0)
    assert one.utilisation(1_000.0)[1] == pytest.approx(0.6)
    one.join(1, 2_000.0)
    assert one.utilisation(2_002.0)[1] == pytest.approx(6 / 12)
    one.join(2, 300.0)
    assert one.utilisation(300.0)[2] == 0.0


def test_prometheus_names_the_largest_searches_and_adds_up_the_rest() -> None:
    one = account()
    one.record("c", "validate", Outcome.CANCELLED, 1, 2.0)
    text = exposition(one, 200.0, searches=1).decode()
    assert 'specgen_pool_gpu_seconds_total{outcome="useful",search="a",stage="validate"} 31.0' in text
    assert 'specgen_pool_gpu_seconds_total{outcome="cancelled",search="other",stage="validate"} 7.0' in text
    assert 'search="b"' not in text
    assert 'specgen_pool_gpu_busy_share{gpu="0"} 0.5' in text


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(list(Outcome)), st.integers(0, 3), st.integers(0, 99)))
)
def test_every_second_is_in_every_sum(records: list[tuple[str, Outcome, int, int]]) -> None:
    one = Account()
    for gpu in range(4):
        one.join(gpu, 0.0)
    for search, outcome, gpu, seconds in records:
        one.record(search, "validate", outcome, gpu, float(seconds))
    total = sum(seconds for *_, seconds in records)
    assert one.total() == sum(one.by_search().values()) == sum(one.by_outcome().values()) == total
    assert sum(one.utilisation(1.0).values()) == pytest.approx(total)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.record("a", "validate", Outcome.USEFUL, 0, -1.0), "seconds=-1.0: use a number of at least 0"),
        (lambda a: a.record("a", "validate", Outcome.USEFUL, 9, 1.0), "gpu=9: it never joined the pool"),
        (lambda a: a.join(0, 1.0), "gpu=0: it is in the pool already"),
        (lambda a: a.leave(9, 1.0), "gpu=9: it is not in the pool"),
    ],
)
def test_what_cannot_be_is_one_clear_error(call, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        call(account())
    assert str(raised.value) == message
