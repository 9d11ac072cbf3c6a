"""Prefetching for waiting requests, on SGLang's radix cache over shared memory: what is fetched, and what never is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.tier.policy import Source, spare_tokens
from tests.tier.conftest import TOKENS
from tests.tier.support import Setting
from tests.tier.two_ranks import LENGTH, publish, restore, tokens_of

MARK = "specgen_source"  # as in tier/cache.py, which imports SGLang


def waiting(prefix: int, rid: str = "") -> Any:
    """A request that has a prefix and two tokens more."""
    ids = [*tokens_of(prefix), 5, 6]
    return SimpleNamespace(rid=rid or f"r{prefix}", origin_input_ids=ids, output_ids=[], extra_key=None)


def step(one: Setting, *queue: Any, promised: int = 0) -> int:
    return int(one.cache.prefetcher.step(list(queue), promised))


def test_a_waiting_requests_prefix_is_on_the_device_before_it_is_admitted(evicted: Setting) -> None:
    free = evicted.allocator.available_size()
    assert step(evicted, waiting(1)) == LENGTH
    assert evicted.allocator.available_size() == free - LENGTH
    assert evicted.cache.protected_size() == LENGTH
    evicted.cache.check_hicache_events()
    assert (evicted.cache.protected_size(), evicted.cache.evictable_size()) == (0, LENGTH)
    assert evicted.accounted() == TOKENS
    restores = evicted.cache.stats.counts["restores"]
    assert restore(evicted.cache, evicted.tier, 1) == LENGTH
    assert evicted.cache.stats.counts["restores"] == restores
    assert evicted.cache.stats.counts["prefetched_tokens"] == LENGTH


def test_batches_wait_for_a_prefetch_until_it_has_arrived(evicted: Setting) -> None:
    """A request that is admitted while its prefix arrives must not read pages that are not there."""
    cache = evicted.cache
    assert cache.ready_to_load_host_cache() == -1
    assert step(evicted, waiting(0))
    ahead = cache.ready_to_load_host_cache()
    assert ahead == cache.cache_controller.layer_done_counter.producer_index >= 0
    assert cache.ready_to_load_host_cache() == ahead
    cache.check_hicache_events()
    assert cache.ready_to_load_host_cache() == -1


def test_a_second_load_waits_for_the_first_to_end(evicted: Setting) -> None:
    assert step(evicted, waiting(0)) == LENGTH
    assert step(evicted, waiting(1)) == 0
    evicted.cache.check_hicache_events()
    assert step(evicted, waiting(1)) == LENGTH


def test_nothing_is_evicted_and_nothing_promised_is_taken(evicted: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evicted.cache, "evict", lambda *_: pytest.fail("a prefetch evicted"))
    held = evicted.allocator.alloc(TOKENS - 2 * LENGTH)
    assert step(evicted, waiting(0), waiting(1), promised=LENGTH + 1) == 0
    assert step(evicted, waiting(2), waiting(1, "r1b"), promised=LENGTH) == LENGTH
    evicted.cache.check_hicache_events()
    assert evicted.allocator.available_size() == LENGTH
    evicted.allocator.free(held)


def test_a_forks_answer_makes_room_and_nothing_else_does(evicted: Setting) -> None:
    held = evicted.allocator.alloc(TOKENS - 2 * LENGTH)
    publish(evicted.cache, evicted.tier, 5)
    publish(evicted.cache, evicted.tier, 6)
    evicted.cache.check_hicache_events()
    assert evicted.allocator.available_size() == 0
    assert step(evicted, waiting(0, "first")) == 0  # both may be read again
    answer = next(node for node in evicted.cache.evictable_leaves if node.key.token_ids[0] == tokens_of(6)[0])
    setattr(answer, MARK, (Source.FORK, "s"))
    assert step(evicted, waiting(0, "second"), waiting(1)) == LENGTH
    evicted.cache.check_hicache_events()
    kept = {node.key.token_ids[0] for node in evicted.cache.evictable_leaves}
    assert kept == {tokens_of(0)[0], tokens_of(5)[0]}
    evicted.allocator.free(held)


def test_requests_that_share_a_prefix_fetch_it_once_and_are_not_looked_up_every_step(
    evicted: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = []
    original = evicted.cache.match_prefix
    monkeypatch.setattr(evicted.cache, "match_prefix", lambda params: (lookups.append(1), original(params))[1])
    queue = [waiting(0, "first"), waiting(0, "second")]
    assert step(evicted, *queue) == LENGTH
    evicted.cache.check_hicache_events()
    seen = len(lookups)
    for _ in range(5):
        assert step(evicted, *queue) == 0
    assert len(lookups) == seen
    for _ in range(16):
        step(evicted, *queue)
    assert len(lookups) == seen + len(queue)


def test_pages_lost_meanwhile_are_not_fetched_and_nothing_leaks(evicted: Setting) -> None:
    for lender in evicted.tier.own:
        for epoch in lender.epochs().values():
            lender.revoke(epoch, 13, bound_s=2.0)
    assert step(evicted, waiting(0), waiting(1)) == 0
    evicted.cache.check_hicache_events()
    assert evicted.accounted() == evicted.allocator.available_size() == TOKENS


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 10_000))
def test_what_is_spare_is_free_and_leaves_what_was_promised(free: int, evictable: int, promised: int) -> None:
    spare = spare_tokens(free, evictable, promised)
    assert 0 <= spare <= free
    assert spare == 0 or free + evictable - spare >= promised
