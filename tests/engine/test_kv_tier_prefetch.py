"""Prefetching on real weights: a request that has to wait finds its evicted prefix on the device once admitted.

The lenders live in this process, as in test_kv_tier: the last test takes memory back while prefixes are fetched.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import tests.tier.support  # noqa: F401  (skipped where that is)
from tests.engine.conftest import Client, StartServer
from tests.engine.test_kv_tier import Lenders, state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POOL, PREFIX, RUNNING = 1024, 150, 2


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1_000, 40_000) for _ in range(length)]


@pytest.fixture(scope="module")
def lenders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lenders]:
    folder = tmp_path_factory.mktemp("lenders")
    folder.chmod(0o700)
    some = Lenders(folder, every_s=0.3, most=8)
    yield some
    some.close()


@pytest.fixture(scope="module")
def tier(start_server: StartServer, lenders: Lenders) -> Iterator[Client]:
    arguments = ["--smollm", "--max-total-tokens", str(POOL), "--max-running-requests", str(RUNNING)]
    flags = ["--specgen-kv", "loopback", "--specgen-kv-directory", str(lenders.folder), "--specgen-kv-chunk-mib", "1"]
    with start_server(*arguments, *flags) as client:
        yield client


def asked(number: int) -> list[int]:
    return [*prompt(number, PREFIX), 17, 18]


def while_decoding(
    tier: Client, asks: list[list[int]], turn: int = 0, lenders: Lenders | None = None
) -> list[dict[str, Any]]:
    """Two decodes fill the batch and the others wait, with their prefixes in the tier only and KV to spare for them.

    Meanwhile `lenders` take memory back.
    """
    tier.generate(prompt(100 + 10 * turn, 830), 2)
    tier.generate(prompt(101 + 10 * turn, 400), 2)  # takes the KV of all before it, and leaves some free
    with ThreadPoolExecutor(RUNNING + len(asks)) as threads:
        decodes = [threads.submit(tier.generate, prompt(102 + 10 * turn + i, 12), 70) for i in range(RUNNING)]
        trouble = None if lenders is None else (lenders, lenders.make_trouble())
        try:
            time.sleep(1.5)
            answers = list(threads.map(lambda ids: tier.generate(ids, 8), asks))
            for decode in decodes:
                decode.result()
        finally:
            if trouble is not None:
                trouble[0].calm(trouble[1])
    return answers


def check_books(found: dict[str, Any]) -> None:
    device = found["device"]
    assert found["integrity"] == "ok"
    assert device["free"] + device["evictable"] == device["total"]
    assert device["protected"] == 0


def test_a_waiting_request_finds_its_prefix_fetched(tier: Client) -> None:
    expected = tier.generate(asked(1), 8)["output_ids"]
    before = state(tier)["counts"]
    (waited,) = while_decoding(tier, [asked(1)])
    found = state(tier)
    assert found["counts"]["prefetched_tokens"] - before["prefetched_tokens"] >= PREFIX
    assert found["counts"]["hit_tokens_tier"] == before["hit_tokens_tier"]
    assert waited["meta_info"]["cached_tokens_details"]["device"] >= PREFIX
    assert waited["output_ids"] == expected
    check_books(found)


def test_answers_stay_the_same_while_lenders_take_back_what_is_being_fetched(tier: Client, lenders: Lenders) -> None:
    asks = [asked(number) for number in (2, 3, 4)]
    expected = [tier.generate(ids, 8)["output_ids"] for ids in asks]
    before = state(tier)["counts"]
    for turn in range(1, 5):
        assert [answer["output_ids"] for answer in while_decoding(tier, asks, turn, lenders)] == expected
    found = state(tier)
    assert found["counts"]["prefetched_tokens"] > before["prefetched_tokens"]
    assert found["counts"]["moved_pages"] + found["counts"]["lost_pages"] > 0
    assert found["counts"]["late_mismatched_pages"] == 0
    check_books(found)
