"""The arithmetic of bench.kv_tier; its figures come from real runs (bench/results)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.kv_tier import FULL, MEASURES, quiet_order, shortened
from bench.kv_tier_client import Client, Loads
from bench.kv_tier_decode import Windows
from bench.kv_tier_measure import loaded
from bench.kv_tier_searches import expected_s, search_steps
from bench.kv_tier_servers import pool_tokens, second_level_tokens
from specgen_engine.errors import SpecGenError

SGLANG = (
    'sglang:load_back_tokens_total{tp_rank="0"} 3000.0\n'
    'sglang:load_back_duration_seconds_sum{tp_rank="0"} 0.5\n'
    'sglang:load_back_duration_seconds_bucket{le="0.1",tp_rank="0"} 7.0\n'
)
TIER = (
    'specgen_kv_restore_seconds_total{tp_rank="0"} 0.4\nspecgen_kv_admission_seconds_total{tp_rank="0"} 0.01\n'
    'specgen_kv_admission_seconds_total{tp_rank="1"} 0.02\n'
)


def client_of(text: str) -> Client:
    client = Client("http://nowhere", 1000)
    client._http = cast(Any, SimpleNamespace(get=lambda _url: SimpleNamespace(text=text)))
    return client


def test_loads_are_read_from_sglangs_own_counts_and_from_the_tiers_where_there_are_none() -> None:
    assert client_of(SGLANG).loads() == Loads(3000, 0.5, None)
    assert client_of(SGLANG + TIER).loads() == Loads(3000, 0.5, pytest.approx(0.03))
    assert client_of(TIER).loads().seconds == 0.4
    assert Loads(5, 3.0, 0.5).since(Loads(2, 1.0, 0.25)) == Loads(3, 2.0, 0.25)
    assert Loads(5, 3.0, None).since(Loads(2, 1.0, None)).admission_s is None


def test_bytes_a_second_are_those_of_the_load_alone() -> None:
    found = loaded(client_of(""), [Loads(2_000_000, 0.5, 0.001), Loads(1_000_000, 0.25, 0.003)])
    assert found == {"gbps": 4.0, "load_ms": 375.0, "loaded_tokens": 3_000_000} | {
        "admission_ms": 2.0,
        "check_ms": None,
        "launch_ms": None,
    }
    assert loaded(client_of(""), [Loads(10, 0.0, None)])["gbps"] is None


def test_the_pool_is_a_quarter_of_what_the_searches_need() -> None:
    steps = search_steps(FULL)
    assert len(steps) == FULL.steps
    assert FULL.searches * steps[-1] == pytest.approx(4 * pool_tokens(64_000), abs=FULL.searches)
    assert steps[0] == pytest.approx(steps[-1] / FULL.steps, abs=1)


def test_a_slowdown_is_that_of_each_pair_of_windows() -> None:
    windows = Windows(client_of(""), FULL, cast(Any, None), [], [])
    windows.rates |= {"alone": [100.0, 200.0], "own": [90.0, 180.0], "restored": [81.0, 171.0]}
    assert windows.slowdown("own", "alone") == 0.1
    assert windows.slowdown("restored", "own") == pytest.approx(1 - (0.9 + 0.95) / 2)


def test_a_shorter_plan_keeps_the_crowd_within_the_pool() -> None:
    short = shortened(FULL, 32_000)
    assert short.prefixes == (2_000, 8_000, 16_000, 32_000)
    assert short.crowd * (short.crowd_tokens + 8) < pool_tokens(32_000)
    assert shortened(FULL, 64_000) == FULL
    with pytest.raises(SpecGenError, match="--longest 4000: two prefixes at least"):
        shortened(FULL, 4_000)


def test_searches_are_expected_to_take_what_they_took_on_two_h200_and_some_more() -> None:
    measured = FULL._replace(steps=4, search_tokens=32)
    assert 46 < expected_s(measured, "host") < 46 * 1.2
    assert 44.6 < expected_s(measured, "peer") < 44.6 * 1.2
    assert 115 < expected_s(measured, "off") < 115 * 1.25  # it had 92 of 96 answers after 106 s


def test_a_whole_run_fits_280_seconds_of_which_the_lanes_take_170() -> None:
    quiet = quiet_order(list(MEASURES), ["peer", "host"])
    assert quiet[-2:] == [("searches", "peer"), ("decodes", "host")]
    assert 57 + 16 + expected_s(FULL, "off") < 180
    assert 180 + sum(MEASURES[name][1](FULL, level) for name, level in quiet[:-1]) < 280


def test_the_second_level_is_as_large_as_what_is_measured_needs() -> None:
    searched = FULL.searches * search_steps(FULL)[-1] + FULL.searches * FULL.steps * 3 * (FULL.search_tokens + 8)
    assert searched < second_level_tokens(64_000, ("decodes", "searches")) < 1.06 * searched
    assert second_level_tokens(64_000, ("decodes",)) == 96_000
    assert second_level_tokens(64_000, tuple(MEASURES)) == int(4.7 * 64_000)
