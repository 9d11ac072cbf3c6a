"""The remote KV tier on real weights (SmolLM2-135M, float32, shared memory): the same tokens, from a pool that evicts.

The lenders live in this process, so that the tests can take memory back, or die, while the server works.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import tests.tier.support  # noqa: F401  (skipped where that is)
from specgen_engine.kv.base import LeaseRefused
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from tests.engine.conftest import TASK, Client, StartServer
from tests.engine.test_fork_kv import tokens_of

pytestmark = pytest.mark.timeout(900)

POOL = 1024
CHUNK = 1 << 20
PROMPTS, LENGTH, TOKENS = 5, 330, 10
SEED = int(os.environ.get("SPECGEN_TEST_SEED", "5"))  # of what lenders do
SEARCH = {"task": TASK, "trigger": "every:12", "termination": "none", "fork": {"max_tokens": 6}}


def prompt(number: int) -> list[int]:
    generator = random.Random(number)
    return [generator.randrange(1_000, 40_000) for _ in range(LENGTH)]


def answers(client: Client, rounds: int = 2) -> list[list[int]]:
    """Every prompt, again and again: more of them than the pool holds, so each is evicted before it is asked again."""
    return [
        client.generate([*prompt(number), 900 + turn, 17], TOKENS)["output_ids"]
        for turn in range(rounds)
        for number in range(PROMPTS)
    ]


class Lenders:
    """Two lenders of the server's, one of which dies and comes back; both take memory back at random."""

    def __init__(self, folder: Path, every_s: float = 0.15, most: int = 30) -> None:
        """Trouble every `every_s` seconds; fewer than `most` chunks are taken back at once."""
        self.folder, self.every_s, self.most = folder, every_s, most
        self.alive = [self._start(0), self._start(1)]
        self.revocations = self.deaths = 0
        self._stop = threading.Event()

    def _start(self, number: int) -> Lender:
        return Lender(self.folder, f"lender-{number}", LoopbackBackend(), CHUNK, 80)

    def trouble(self) -> None:
        generator = random.Random(SEED)
        while not self._stop.wait(self.every_s):
            if generator.random() < 0.15:
                self.alive[1].crash()
                self.deaths += 1
                self.alive[1] = self._start(1)
                continue
            lender = generator.choice(self.alive)
            for epoch in lender.epochs().values():
                try:
                    self.revocations += lender.revoke(epoch, generator.randrange(1, self.most), bound_s=0.5).chunks
                except LeaseRefused:
                    continue

    def make_trouble(self) -> threading.Thread:
        self._stop.clear()
        thread = threading.Thread(target=self.trouble)
        thread.start()
        return thread

    def calm(self, thread: threading.Thread) -> None:
        self._stop.set()
        thread.join()

    def close(self) -> None:
        for lender in self.alive:
            lender.close()


def state(client: Client) -> dict[str, Any]:
    """Once the server is idle, and its last copies have ended."""
    for _ in range(50):
        found: dict[str, Any] = client.get("/server_info").json()["internal_states"][0]["specgen_kv"]
        if found["device"]["protected"] == 0 and found["pages"]["in_flight"] == 0:
            break
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def lenders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lenders]:
    folder = tmp_path_factory.mktemp("lenders")
    folder.chmod(0o700)
    some = Lenders(folder)
    yield some
    some.close()


@pytest.fixture(scope="module")
def tier(start_server: StartServer, lenders: Lenders) -> Iterator[Client]:
    arguments = ["--smollm", "--max-total-tokens", str(POOL), "--max-running-requests", "8", "--enable-metrics"]
    flags = ("--specgen-kv", "loopback", "--specgen-kv-directory", str(lenders.folder), "--specgen-kv-chunk-mib", "1")
    with start_server(*arguments, *flags, "--specgen-fork-per-search", "4") as client:
        yield client


@pytest.fixture(scope="module")
def expected(start_server: StartServer) -> list[list[int]]:
    with start_server("--smollm", "--max-total-tokens", str(POOL)) as plain:
        return answers(plain)


def test_outputs_are_those_of_a_server_without_the_tier(tier: Client, expected: list[list[int]]) -> None:
    before = state(tier)["counts"]
    assert answers(tier) == expected
    after = state(tier)["counts"]
    assert after["hit_tokens_tier"] - before["hit_tokens_tier"] >= 0.99 * PROMPTS * LENGTH
    assert after["mismatched_pages"] == after["late_mismatched_pages"] == 0


def test_an_evicted_fork_prefix_comes_from_the_tier(tier: Client) -> None:
    answer = tier.chat("Tell me about rivers. " * 12, SEARCH, max_tokens=60)
    _, forks, report = tokens_of(answer, tier)
    assert forks
    inserted = [record["prefix_inserted"] for record in report["forks"]]
    answers(tier, rounds=1)
    for fork, length in zip(forks[-2:], inserted[-2:], strict=True):
        found = tier.generate(fork["input_ids"], 1)["meta_info"]["cached_tokens_details"]
        assert found["host"] + found["device"] >= 0.99 * length
    assert inserted[-1] > 100


def test_outputs_stay_the_same_while_lenders_take_memory_back_and_die(
    tier: Client, expected: list[list[int]], lenders: Lenders
) -> None:
    thread = lenders.make_trouble()
    try:
        assert answers(tier) == expected
    finally:
        lenders.calm(thread)
    assert lenders.revocations > 0
    assert lenders.deaths > 0
    found = state(tier)
    assert found["integrity"] == "ok"
    assert found["counts"]["revoked_chunks"] > 0
    assert found["counts"]["lenders_lost"] > 0
    assert found["counts"]["moved_pages"] + found["counts"]["lost_pages"] > 0
    assert found["counts"]["late_mismatched_pages"] == 0


def test_every_page_is_accounted_for_after_a_storm_of_aborts_and_retractions(tier: Client) -> None:
    """Ten requests that want more KV than there is; half of the clients leave."""

    def ask(number: int) -> None:
        ids = prompt(number % PROMPTS)[: 60 + 20 * number]
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 90, "ignore_eos": True}, "stream": True}
        with httpx.stream("POST", f"{tier.server.url}/generate", json=body, timeout=120) as stream:
            for seen, _ in enumerate(stream.iter_lines()):
                if number % 2 and seen > 8 * number:
                    return

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(ask, range(10)))
    tier.post("/abort_request", {"rid": "", "abort_all": True})
    found = state(tier)
    device, pages = found["device"], found["pages"]
    assert found["integrity"] == "ok"
    assert device["free"] + device["evictable"] + device["protected"] == device["total"]
    assert pages["free"] + pages["used"] + pages["in_flight"] + pages["revoking"] == pages["total"]
    tier.flush()
    emptied = state(tier)
    assert emptied["device"]["free"] == emptied["device"]["total"]
    assert emptied["pages"]["used"] == 0
    metrics = tier.get("/metrics").text
    for name in ("restored_bytes", "hit_tokens_tier", "restores", "restore_seconds", "revoked_chunks"):
        assert f"specgen_kv_{name}_total" in metrics
    assert "specgen_kv_mismatched_pages_total" in metrics
