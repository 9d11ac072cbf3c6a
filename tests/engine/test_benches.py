"""The arithmetic of the engine benches; their figures come from real runs (bench/results)."""

from __future__ import annotations

import math

import pytest

from bench.engine_overhead import Pair, interval_of
from bench.engine_starved import ASKED, POOL, Run, summary_of


def test_the_interval_is_students_on_logarithms() -> None:
    found = interval_of([0.9, 1 / 0.9])
    assert found.mean == pytest.approx(1)
    assert found.high == pytest.approx(math.exp(12.706 * math.log(1 / 0.9)), rel=1e-3)
    assert found.low == pytest.approx(1 / found.high)
    assert interval_of([1.1] * 20) == pytest.approx((1.1, 1.1, 1.1))
    with pytest.raises(ValueError, match="--pairs 1"):
        interval_of([1.0])


def test_a_pairs_ratio_is_the_flags_over_the_others() -> None:
    assert Pair(with_flag=99.0, without=100.0).ratio == 0.99


def test_the_starved_pool_is_a_third_and_the_summary_pools_all_runs() -> None:
    assert pytest.approx(ASKED / 3, abs=1) == POOL
    forked, plain = Run([0.2, 0.4], 1, 5, 9), Run([0.1, 0.2], 2, 0, 0)
    summary = summary_of([(forked, plain), (forked, plain)])
    assert summary["ttft_p95_ratio"] == pytest.approx(2, rel=0.05)
    assert (summary["forks"], summary["forks_retracted"]) == (18, 10)
    assert summary["ordinary_retracted"] == {"with_forks": 2, "without": 4}
