"""Ordinary chat traffic of recorded lengths, and searches beside it, against one server of bench.overhead."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx

from bench.streamed_search import streamed_search

# 64 requests in a row of a production chat service: (prompt tokens, generated tokens), on 2023-11-16 from 18:43:10.58,
# AzureLLMInferenceTrace_conv.csv, github.com/Azure/AzurePublicDataset, CC-BY 4.0 (Patel et al., Splitwise, ISCA 2024).
RECORDED = (
    (376, 74), (181, 201), (4076, 107), (408, 89), (4079, 61), (4084, 57), (397, 98), (2724, 109), (4083, 75),
    (391, 161), (1014, 394), (385, 97), (415, 113), (4084, 25), (412, 101), (4074, 50), (1111, 459), (2376, 45),
    (407, 113), (2966, 55), (380, 73), (382, 99), (375, 52), (206, 158), (410, 96), (1036, 451), (375, 41), (385, 102),
    (374, 79), (4077, 26), (181, 142), (428, 95), (376, 42), (1315, 160), (374, 87), (382, 78), (4081, 53), (334, 18),
    (381, 96), (4081, 69), (371, 87), (4077, 71), (2584, 115), (200, 183), (374, 63), (873, 382), (4087, 39),
    (404, 144), (4086, 110), (200, 179), (376, 52), (2335, 93), (4085, 39), (382, 87), (913, 447), (1066, 403),
    (392, 65), (396, 162), (4078, 92), (2066, 36), (4086, 34), (1049, 939), (2284, 111), (1220, 60),
)  # fmt: skip
FORK_EVERY, FORK_TOKENS, SEARCH_TOKENS = 400, 512, 60_000
QUIET_S, BEGIN_S = 30.0, 60.0
TASK = """import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x) + 1
def get_inputs():
    return [torch.randn(64, 64)]
def get_init_inputs():
    return []
"""


class Length(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


class Arm(NamedTuple):
    """flag: the server has --enable-specgen. trigger: of the searches beside the traffic; None: there are none."""

    name: str
    flag: bool
    trigger: str | None


class Served(NamedTuple):
    """One burst. ttft_s: by request; gaps_s: between the tokens of each; search_rate: tokens a second of a search."""

    wall_s: float
    tokens: int
    ttft_s: list[float]
    gaps_s: list[float]
    search_rate: float | None
    forks: int


def lengths(shrink: int) -> list[Length]:
    """The recorded ones; a CPU gets prompts `shrink` times shorter, and answers by its root, of four tokens or more."""
    root = max(1, round(shrink**0.5))
    return [Length(max(4, prompt // shrink), max(4, output // root)) for prompt, output in RECORDED]


class Traffic:
    """Bursts of the same requests, `at_once` of them running, against one server."""

    def __init__(self, client: httpx.AsyncClient, url: str, wanted: Sequence[Length], at_once: int) -> None:
        self.client, self.url, self.wanted, self.at_once = client, url, wanted, at_once

    async def burst(self, trigger: str | None, searches: int, fork_every: int) -> Served:
        """Ends when every request is answered; the searches are then given up. Raises RuntimeError when one fails."""
        await self.quiet()
        asked = {"none": "none", "forks": f"every:{fork_every}"}.get(trigger or "", trigger)
        async with self.searching(searches if asked else 0, asked or "none") as counts:
            before, started = list(counts), time.perf_counter()
            waiting = iter(enumerate(self.wanted))
            rows = await asyncio.gather(*(self._worker(waiting) for _ in range(self.at_once)))
            wall = time.perf_counter() - started
            gained = [after - first for after, first in zip(counts, before, strict=True)]
            forks = await self._forks() if asked else 0
        answered = list(itertools.chain.from_iterable(rows))
        rate = sum(gained) / len(gained) / wall if gained else None
        gaps = [gap for one in answered for gap in _gaps(one)]
        firsts = [one[1] - one[0] for one in answered]
        return Served(wall, sum(length.output for length in self.wanted), firsts, gaps, rate, forks)

    async def _worker(self, waiting: Iterator[tuple[int, Length]]) -> list[list[float]]:
        found = []
        for number, length in waiting:
            found.append(await self._ask(number, length))
        return found

    async def _ask(self, number: int, length: Length) -> list[float]:
        """Seconds: when it was sent, and when each token came. Prompts differ in their first token: none is cached."""
        body = {
            "input_ids": [1000 + number, *range(3000, 3000 + length.prompt - 1)], "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": length.output, "ignore_eos": True},
        }  # fmt: skip
        times = [time.perf_counter()]
        async with self.client.stream("POST", f"{self.url}/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        if len(times) < 2:
            raise RuntimeError(f"{self.url}: request {number} got no token")
        return times

    @asynccontextmanager
    async def searching(self, searches: int, trigger: str) -> AsyncIterator[list[int]]:
        """Searches that reason all the while; yields how many tokens each has said so far."""
        counts, begun = [0] * searches, [asyncio.Event() for _ in range(searches)]
        tasks = [asyncio.create_task(self._search(n, trigger, counts, begun[n])) for n in range(searches)]
        try:
            for task, event in zip(tasks, begun, strict=True):
                await self._begun(task, event)
            yield counts
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _begun(self, task: asyncio.Task[None], event: asyncio.Event) -> None:
        end = time.monotonic() + BEGIN_S
        while not event.is_set():
            if task.done() or time.monotonic() > end:
                raise RuntimeError(f"{self.url}: a search ended, or said nothing for {BEGIN_S:g} s")
            await asyncio.sleep(0.02)

    async def _search(self, number: int, trigger: str, counts: list[int], begun: asyncio.Event) -> None:
        body = streamed_search(TASK, number, trigger, FORK_TOKENS, SEARCH_TOKENS)
        async with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    counts[number] += 1
                    begun.set()

    async def _forks(self) -> int:
        """Of the searches that run."""
        answer = await self.client.get(f"{self.url}/specgen/searches")
        return sum(one["forks"] for one in answer.json()["searches"] if one["ended_by"] is None)

    async def quiet(self) -> None:
        """Until nothing of an earlier burst is left: the next finds an empty cache."""
        end = time.monotonic() + QUIET_S
        while time.monotonic() < end:
            if (await self.client.post(f"{self.url}/flush_cache")).is_success:
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"{self.url} does not become quiet")


def _gaps(times: Sequence[float]) -> list[float]:
    """Between tokens, without the first one's."""
    return [after - before for before, after in itertools.pairwise(times[1:])]
