"""Searches in a pool of a quarter of their KV: end-to-end seconds with the tier off, in host memory, in a peer GPU.

A search is replayed by its lengths: its text so far is fed, not decoded, for decoding would hide everything else. Each
step has a longer part of the text, a short decode, and two forks of it with short answers; the searches go on side by
side, so that a search's prefix is evicted between its steps. Texts are random, and the same for every server.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.kv_tier_client import Answer, Client, random_ids
from bench.kv_tier_measure import Plan
from bench.kv_tier_servers import pool_tokens

STARVED = 4  # the searches need so many times the pool
FORKS = 2


def search_steps(plan: Plan) -> list[int]:
    """Tokens of a search's text at each of its steps."""
    last = STARVED * pool_tokens(max(plan.prefixes)) // plan.searches
    return [last * number // plan.steps for number in range(1, plan.steps + 1)]


def play(client: Client, number: int, plan: Plan, seed: int) -> list[Answer]:
    """One search. Raises SpecGenError when the server refuses a request."""
    steps = search_steps(plan)
    text = random_ids(seed * 53_000 + number, steps[-1])
    answers = []
    with ThreadPoolExecutor(FORKS) as threads:
        for step, length in enumerate(steps):
            first = (number * plan.steps + step) * (FORKS + 1)
            answers.append(client.ask(text[:length], plan.search_tokens, suffix=first))
            forks = [threads.submit(client.ask, text[:length], plan.search_tokens, first + 1 + i) for i in range(FORKS)]
            answers += [fork.result() for fork in forks]
    return answers


def measure_searches(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """All searches at once, from an empty cache."""
    client.flush()
    began = time.perf_counter()
    with ThreadPoolExecutor(plan.searches) as threads:
        played = list(threads.map(lambda number: play(client, number, plan, seed), range(plan.searches)))
    seconds = time.perf_counter() - began
    answers = [answer for one in played for answer in one]
    asked = plan.searches * (FORKS + 1) * sum(search_steps(plan))
    device, tier = sum(answer.device for answer in answers), sum(answer.tier for answer in answers)
    return [
        {
            "level": level,
            "server": level,
            "load": f"{plan.searches} searches",
            "prefix_tokens": search_steps(plan)[-1],
            "pool_tokens": pool_tokens(max(plan.prefixes)),
            "wall_s": round(seconds, 3),
            "requests": len(answers),
            "asked_tokens": asked,
            "device_tokens": device,
            "tier_tokens": tier,
            "computed_tokens": asked - device - tier,
            "kind": "replayed by lengths, random text",
            "ttft_ms": None,
            "gbps": None,
            "decode_slowdown": None,
        }
    ]
