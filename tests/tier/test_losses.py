"""What is dropped when pages are lost, and that nothing is dropped twice: on the device, evicted, and on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tier.conftest import TOKENS
from tests.tier.storm import PAGE, Storm
from tests.tier.support import Setting, radix_cache, tier
from tests.tier.test_prefetch import step, waiting
from tests.tier.two_ranks import LENGTH, evict, publish, restore, revoke, tokens_of


def node_of(cache: Any, prefix: int) -> Any:
    return next(node for node in cache.root_node.children.values() if node.key.token_ids[0] == tokens_of(prefix)[0])


def test_room_for_a_rewritten_copy_comes_from_prefixes_that_lost_pages_too(evicted: Setting) -> None:
    """The device holds the newest prefix; nothing is left of the arena, so its new copy finds no room."""
    assert restore(evicted.cache, evicted.tier, 2)
    revoke(evicted.tier, 13)
    evicted.cache.check_hicache_events()
    evicted.tier.pool.check_integrity()
    assert [node.evicted for node in evicted.cache.root_node.children.values()] == [False]
    assert not node_of(evicted.cache, 2).backuped
    assert evicted.accounted() == TOKENS


def test_a_prefix_on_its_way_keeps_its_copy_until_it_has_arrived(
    evicted: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that were written again meanwhile would be made of pages that are not there yet."""
    cache = evicted.cache
    ready = cache._count_ready_acks
    assert step(evicted, waiting(0)) == LENGTH
    revoke(evicted.tier, 13)
    monkeypatch.setattr(cache, "_count_ready_acks", lambda _queue: 0)
    for _ in range(2):
        cache.check_hicache_events()
        node = node_of(cache, 0)
        assert (node.backuped, node.lock_ref) == (True, 1)
        assert list(cache.root_node.children.values()) == [node]  # the others were lost, and dropped at once
    monkeypatch.setattr(cache, "_count_ready_acks", ready)
    cache.check_hicache_events()
    assert (node.backuped, node.lock_ref) == (False, 0)
    assert int(evicted.tier.pool.slot_used.sum()) == 0
    assert restore(cache, evicted.tier, 0) == LENGTH
    assert evicted.accounted() == TOKENS


def test_a_prefix_that_has_arrived_and_waits_to_be_read_stays_on_the_device(evicted: Setting) -> None:
    cache = evicted.cache
    assert step(evicted, waiting(1)) == LENGTH
    cache.check_hicache_events()
    revoke(evicted.tier, 13)
    cache.check_hicache_events()
    assert not node_of(cache, 1).backuped
    assert restore(cache, evicted.tier, 1) == LENGTH
    evict(cache)
    assert evicted.allocator.available_size() == TOKENS


@pytest.mark.parametrize("head", [80, 96])
def test_what_lies_below_a_prefix_on_its_way_may_be_lost(evicted: Setting, head: int) -> None:
    """Only the head of a prefix is fetched; pages of its tail are lost, then some of the head too."""
    cache = evicted.cache
    request = waiting(0)
    request.origin_input_ids = [*tokens_of(0)[:head], 5, 6]
    assert step(evicted, request) == head
    tail = next(iter(node_of(cache, 0).children.values()))
    lost = np.zeros(evicted.tier.pool.page_num, np.bool_)
    lost[int(tail.host_value[PAGE]) // PAGE] = True
    cache.drop(lost)
    assert [len(node.key) for node in node_of(cache, 0).children.values()] == [PAGE]
    lost[int(node_of(cache, 0).host_value[0]) // PAGE] = True
    cache.drop(lost)
    assert node_of(cache, 0).backuped
    cache.check_hicache_events()
    cache.drop(lost)
    assert node_of(cache, 0).children == {}
    assert restore(cache, evicted.tier, 0) == head
    evicted.tier.pool.check_integrity()


def test_a_flush_while_a_prefix_is_on_its_way_leaves_nothing_of_it(evicted: Setting) -> None:
    cache = evicted.cache
    assert step(evicted, waiting(0)) == LENGTH
    Storm(evicted, 0).reset()
    assert evicted.allocator.available_size() == TOKENS
    for prefix in range(3):
        publish(cache, evicted.tier, prefix)
    evict(cache)
    assert step(evicted, waiting(1, "again")) == LENGTH
    cache.check_hicache_events()
    assert restore(cache, evicted.tier, 1) == LENGTH


@pytest.mark.parametrize("seed", range(6))
def test_books_and_bytes_are_right_in_a_storm_of_losses_and_prefetches(tmp_path: Path, group: Any, seed: int) -> None:
    folder = tmp_path / "lender"
    folder.mkdir(mode=0o700)
    with tier(folder, "mha", PAGE, torch.float32, chunks=(5, 5), chunk_bytes=256 << 10, tokens=512) as one:
        cache = radix_cache(one, group)
        Storm(Setting(cache, one), seed).play(400)
        counts = cache.stats.counts
        assert counts["prefetched_tokens"] > 0
        assert counts["lost_pages"] > 0
