"""Prefetching on real weights: a request that has to wait finds its evicted prefix on the device once admitted."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.conftest import Client, StartServer
from tests.engine.test_kv_tier import state

pytestmark = pytest.mark.timeout(600)

POOL, PREFIX, RUNNING = 1024, 150, 2


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1_000, 40_000) for _ in range(length)]


@pytest.fixture(scope="module")
def tier(start_server: StartServer) -> Iterator[Client]:
    arguments = ["--smollm", "--max-total-tokens", str(POOL), "--max-running-requests", str(RUNNING)]
    flags = ["--specgen-kv", "loopback", "--specgen-kv-chunk-mib", "1", "--specgen-kv-max-chunks", "128"]
    with start_server(*arguments, *flags) as client:
        yield client


def test_a_waiting_request_finds_its_prefix_fetched(tier: Client) -> None:
    """Two decodes fill the batch; a third request's prefix is in the tier only, and there is KV to spare for it."""
    asked = [*prompt(1, PREFIX), 17, 18]
    expected = tier.generate(asked, 8)["output_ids"]
    tier.generate(prompt(2, 830), 2)
    tier.generate(prompt(3, 400), 2)  # takes the first one's and the second one's KV, and leaves some free
    before = state(tier)["counts"]
    with ThreadPoolExecutor(RUNNING + 1) as threads:
        decodes = [threads.submit(tier.generate, prompt(10 + i, 12), 70) for i in range(RUNNING)]
        time.sleep(1.5)
        waited = threads.submit(tier.generate, asked, 8).result()
        for decode in decodes:
            decode.result()
    found = state(tier)
    assert found["counts"]["prefetched_tokens"] - before["prefetched_tokens"] >= PREFIX
    assert found["counts"]["hit_tokens_tier"] == before["hit_tokens_tier"]
    assert waited["meta_info"]["cached_tokens_details"]["device"] >= PREFIX
    assert waited["output_ids"] == expected
    assert found["integrity"] == "ok"
    device = found["device"]
    assert device["free"] + device["evictable"] == device["total"]
    assert device["protected"] == 0
