"""What bench.models loads a server with: bases beside forks, timed, and a storm of searches that clients leave."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import httpx

from bench.models_client import Client, together
from bench.models_forks import Shape, prompt_of
from specgen_engine.errors import SpecGenError

PAIRS = 5
FORK_TOKENS, FORK_EVERY = 31, 256


def slowdown(client: Client, seed: int, shape: Shape) -> dict[str, Any]:
    """Seconds of the bases alone and with a fork of 31 tokens every 256 of theirs.

    The median of pairs that ran one right after the other, each pair in the other order than the one before: what else
    the host does changes from one half minute to the next. `fork_tokens` beside the bases' says how much more was made.
    """
    prompts = [prompt_of(seed * 100 + number, 64) for number in range(shape.bases)]
    forks = 0
    pairs: list[dict[str, float]] = []
    for turn in range(PAIRS + 1):  # the first one warms up
        pair = {}
        for name in ("alone", "forked") if turn % 2 else ("forked", "alone"):
            pair[name], searches = _bases(client, prompts, shape.tokens, name == "forked")
            if turn and name == "forked":
                forks += sum(len(client.record(search)["forks"]) for search in searches)
        pairs += [pair] if turn else []
    return {**slowdown_of(pairs), "forks": forks, "fork_tokens": forks * FORK_TOKENS,
            "base_tokens": PAIRS * shape.bases * shape.tokens}  # fmt: skip


def slowdown_of(pairs: list[dict[str, float]]) -> dict[str, Any]:
    """`slowdown`: median of the pairs' own; least and most beside it."""
    each = [pair["forked"] / pair["alone"] - 1 for pair in pairs]
    return {
        "alone_s": [pair["alone"] for pair in pairs],
        "forked_s": [pair["forked"] for pair in pairs],
        "slowdown": statistics.median(each),
        "slowdown_min": min(each),
        "slowdown_max": max(each),
    }


def _bases(client: Client, prompts: list[str], tokens: int, forked: bool) -> tuple[float, list[str]]:
    settings: dict[str, Any] = {"trigger": "none"}
    if forked:
        settings = {"trigger": f"every:{FORK_EVERY}", "fork": {"max_tokens": FORK_TOKENS}}
    client.flush()
    start = time.perf_counter()
    searches = together([partial(client.search, prompt, tokens, settings) for prompt in prompts])
    return time.perf_counter() - start, searches


def storm(client: Client, seed: int, shape: Shape) -> dict[str, Any]:
    """Three times the bases at once, every second client gone in the midst of it; then nothing may be left."""
    client.flush()
    before = client.state()
    counts = {"ended": 0, "gone": 0, "failed": 0}

    def one(number: int) -> str:
        settings = {"trigger": "every:23", "fork": {"max_tokens": 24}}
        try:
            client.search(prompt_of(seed * 100 + number, 64 + 40 * number), 400, settings, 240 if number % 2 else 1.5)
        except httpx.TimeoutException:
            return "gone"
        except (SpecGenError, httpx.HTTPError):
            return "failed"
        return "ended"

    for result in together([partial(one, number) for number in range(3 * shape.bases)]):
        counts[result] += 1
    time.sleep(1.0)
    client.flush()
    state = client.state()
    return {**counts, "memory_equal": held(state) == held(before), "before": held(before), "state": state}


def held(state: dict[str, Any]) -> dict[str, Any]:
    """Of an idle server with an empty cache: what a storm must leave as it was."""
    kept = {name: state.get("specgen", {}).get(name) for name in ("free_tokens", "watched", "scripts")}
    return {**kept, "memory_usage": state["memory_usage"], "integrity": state.get("specgen_kv", {}).get("integrity")}
