"""Searches in a pool of a quarter of their KV: end-to-end seconds with the tier off, in host memory, in a peer GPU.

A search is replayed by its lengths: its text so far is fed, not decoded, for decoding would hide everything else. Each
step has a longer part of the text, a short decode, and two forks of it with short answers; the searches go on side by
side, so that a search's prefix is evicted between its steps. Texts are random, and the same for every server. Where the
time is over first, what is under way is aborted, and the seconds are a lower bound.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from bench.kv_tier_client import Answer, Client, random_ids
from bench.kv_tier_measure import Plan
from bench.kv_tier_servers import STARVED, pool_tokens
from specgen_engine.errors import SpecGenError

FORKS = 2


def search_steps(plan: Plan) -> list[int]:
    """Tokens of a search's text at each of its steps."""
    last = STARVED * pool_tokens(max(plan.prefixes)) // plan.searches
    return [last * number // plan.steps for number in range(1, plan.steps + 1)]


def compute_s(tokens: int) -> float:
    """Prompt computed from nothing: fits two H200's recompute rows of bench/results/kv_tier_2xH200.json."""
    return 16.7e-6 * tokens + 2.26e-9 * tokens**2


def expected_s(plan: Plan, level: str) -> float:
    """At most, on an H200. Without a second level each step is computed by its base and again by its forks.

    By the logs of two H200: four steps of 32 tokens took 44.6 s (peer) and 46 s (host), and off was to end after
    some 115 s.
    """
    steps = search_steps(plan)
    decode = 7e-6 * sum(steps) * plan.search_tokens
    if level == "off":
        return 1.15 * (2 * plan.searches * sum(map(compute_s, steps)) + decode)
    return 1.15 * (plan.searches * compute_s(steps[-1]) + decode)


def play(client: Client, number: int, plan: Plan, seed: int) -> list[Answer]:
    """One search; its answers until the client's time is over. Raises SpecGenError when a request is refused."""
    steps = search_steps(plan)
    text = random_ids(seed * 53_000 + number, steps[-1])
    answers: list[Answer] = []

    def ask(length: int, suffix: int) -> None:
        try:
            answer = client.ask(text[:length], plan.search_tokens, suffix=suffix)
        except SpecGenError:
            if time.monotonic() < client.until:
                raise
            return  # aborted
        if time.monotonic() < client.until:
            answers.append(answer)

    with ThreadPoolExecutor(FORKS) as threads:
        for step, length in enumerate(steps):
            if time.monotonic() >= client.until:
                break
            first = (number * plan.steps + step) * (FORKS + 1)
            ask(length, first)
            list(threads.map(partial(ask, length), range(first + 1, first + 1 + FORKS)))
    return answers


def measure_searches(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """All searches at once, from an empty cache."""
    client.flush()
    timer = threading.Timer(client.until - time.monotonic(), client.abort) if client.until < math.inf else None
    if timer is not None:
        timer.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(plan.searches) as threads:
        played = list(threads.map(lambda number: play(client, number, plan, seed), range(plan.searches)))
    seconds = time.perf_counter() - began
    if timer is not None:
        timer.cancel()
    return [row_of(level, plan, [answer for one in played for answer in one], seconds)]


def row_of(level: str, plan: Plan, answers: list[Answer], seconds: float) -> dict[str, Any]:
    """`wall_s` of all requests; where some are missing, `at_least_s` instead."""
    requests = plan.searches * plan.steps * (FORKS + 1)
    whole = len(answers) == requests
    asked = plan.searches * (FORKS + 1) * sum(search_steps(plan))
    device, tier = sum(answer.device for answer in answers), sum(answer.tier for answer in answers)
    return {
        "level": level,
        "server": level,
        "load": f"{plan.searches} searches",
        "prefix_tokens": search_steps(plan)[-1],
        "pool_tokens": pool_tokens(max(plan.prefixes)),
        "steps": plan.steps,
        "answer_tokens": plan.search_tokens,
        "wall_s": round(seconds, 3) if whole else None,
        "at_least_s": None if whole else round(seconds, 3),
        "requests": len(answers),
        "requests_asked": requests,
        "asked_tokens": asked,
        "device_tokens": device,
        "tier_tokens": tier,
        "computed_tokens": asked - device - tier if whole else None,
        "kind": "replayed by lengths, random text",
        "ttft_ms": None,
        "gbps": None,
        "decode_slowdown": None,
    }
