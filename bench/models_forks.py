"""The fork checks of bench.models: tokens against an empty cache, decoding beside forks, accounts after a storm."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import httpx

from bench.models_client import Client, Generated, together
from specgen_engine.errors import SpecGenError

BASES, FORKS_EACH, FORK_TOKENS = 8, 8, 16
TOLERANCE = 1e-2
WORDS = ("kernel", "tile", "warp", "row", "sum", "load", "store", "half", "block", "thread", "fuse", "loop", "index")


class Shape(NamedTuple):
    """How much is asked. `longest`: words of the longest prompt; `tokens`: of a base whose speed is measured."""

    bases: int = BASES
    forks: int = FORKS_EACH
    longest: int = 3_000
    tokens: int = 1_024


class Compared(NamedTuple):
    """A fork against the same input computed from an empty cache."""

    fork: int
    equal: bool
    first_equal: bool
    logprob: float
    reused: int
    lost: int


def prompt_of(seed: int, words: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def search_all(client: Client, seed: int, shape: Shape) -> list[dict[str, Any]]:
    """Records of bases that ran at once, forked at multiples of strides of their own: anywhere within a page."""
    generator = random.Random(seed)
    strides = [generator.randrange(33, 61) for _ in range(shape.bases)]
    words = [64 + (shape.longest - 64) * number // max(1, shape.bases - 1) for number in range(shape.bases)]
    calls = [
        partial(
            client.search,
            prompt_of(seed * 100 + number, words[number]),
            strides[number] * shape.forks + 24,
            {"trigger": f"every:{strides[number]}", "fork": {"max_tokens": FORK_TOKENS}},
        )
        for number in range(shape.bases)
    ]
    return [client.record(search) for search in together(calls)]


def check_forks(client: Client, seed: int, shape: Shape) -> dict[str, Any]:
    """One row: forks equal to recomputation, what rounding cost, bases unchanged, and how much a wrong token shows."""
    start = time.monotonic()
    client.flush()
    records = search_all(client, seed, shape)
    forks = [
        (ids, fork)
        for record in records
        for ids, fork in zip(record["ids"]["forks"], record["forks"], strict=True)
        if fork["state"] == "length"
    ]
    with_cache = together_in(shape.bases, [partial(client.generate, ids["input_ids"], 1) for ids, _ in forks])
    order = [at for offset in range(shape.forks) for at in range(offset, len(forks), shape.forks)]
    fresh = from_empty_cache(client, [ids for ids, _ in forks], order, shape.bases)
    again = from_empty_cache(
        client, [ids for ids, _ in forks], order[shape.bases // 2 :] + order[: shape.bases // 2], 5
    )
    compared = [compare(at, forks[at], with_cache[at], fresh[at]) for at in range(len(forks)) if fresh[at].cached < 64]
    return {
        "forks": sum(len(record["forks"]) for record in records),
        "finished": len(forks),
        "states": sorted({fork["state"] for record in records for fork in record["forks"]}),
        "skipped": sum(record["forks_skipped"] for record in records),
        "compared": len(compared),
        "equal": sum(one.equal for one in compared),
        "first_token_equal": sum(one.first_equal for one in compared),
        "logprob_within": sum(one.logprob <= TOLERANCE for one in compared),
        "logprob_max": max((one.logprob for one in compared), default=None),
        "logprob_median": statistics.median([one.logprob for one in compared]) if compared else None,
        "reused_share": _share(compared, forks),
        "rounded_off_mean": statistics.mean([one.lost for one in compared]) if compared else None,
        "rounded_off_max": max((one.lost for one in compared), default=None),
        "control": control([fresh[at] for at in range(len(forks))], [again[at] for at in range(len(forks))]),
        "sensitivity": sensitivity(client, [forks[at][0]["input_ids"] for at in range(0, len(forks), shape.forks)]),
        "bases": check_bases(client, records),
        "seconds": time.monotonic() - start,
    }


def from_empty_cache(
    client: Client, forks: Sequence[dict[str, Any]], order: Sequence[int], at_once: int
) -> dict[int, Generated]:
    """The forks' inputs computed without a cached prefix, so many at once in this order; by the fork's place."""
    found: dict[int, Generated] = {}
    for at in range(0, len(order), max(1, at_once)):
        group = order[at : at + max(1, at_once)]
        client.flush()
        calls = [partial(client.generate, forks[i]["input_ids"], len(forks[i]["output_ids"])) for i in group]
        found |= dict(zip(group, together(calls), strict=True))
    return found


def control(first: Sequence[Generated], second: Sequence[Generated]) -> dict[str, Any]:
    """The engine against itself: both from an empty cache, in batches of other sizes. What forks may differ by, too."""
    away = [_away(a, b) for a, b in zip(first, second, strict=True)]
    return {
        "inputs": len(away),
        "equal": sum(a.ids == b.ids for a, b in zip(first, second, strict=True)),
        "first_token_equal": sum(a.ids[0] == b.ids[0] for a, b in zip(first, second, strict=True)),
        "logprob_within": sum(one <= TOLERANCE for one in away),
        "logprob_max": max(away, default=None),
        "logprob_median": statistics.median(away) if away else None,
    }


def _away(a: Generated, b: Generated) -> float:
    """How far b's logprob of a's first token is from a's; the least that b lists where it lists no such token."""
    least = min(b.first.values()) if b.first else float("-inf")
    return abs(a.logprobs[0] - b.first.get(a.ids[0], least))


def compare(at: int, fork: tuple[dict[str, Any], dict[str, Any]], cached: Generated, fresh: Generated) -> Compared:
    """`lost`: tokens of prompt and reasoning that the fork computed again because its prefix was rounded down."""
    ids, record = fork
    return Compared(
        at,
        list(ids["output_ids"]) == fresh.ids,
        ids["output_ids"][0] == fresh.ids[0],
        _away(cached, fresh),
        record["prefix_reused"],
        record["prompt_tokens"] + record["at_token"] - record["prefix_reused"],
    )


def sensitivity(client: Client, inputs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How far the first token's logprob moves when a page of 64 tokens in the prefix is another: what errors do."""
    client.flush()
    right = together([partial(client.generate, ids, 1) for ids in inputs])
    changed = [other_page(ids, len(ids) // 2) for ids in inputs]
    client.flush()
    wrong = together([partial(client.generate, ids, 1) for ids in changed])
    shifts = [_away(a, b) for a, b in zip(right, wrong, strict=True)]
    same = sum(a.ids == b.ids for a, b in zip(right, wrong, strict=True))
    return {
        "inputs": len(shifts),
        "same_token": same,
        "shift_median": statistics.median(shifts),
        "shift_min": min(shifts),
    }


def other_page(ids: Sequence[int], start: int, page: int = 64) -> list[int]:
    """The ids with the page from `start` on in reverse order and each id one more: another page's KV, as it were."""
    return [*ids[:start], *(one + 1 for one in reversed(ids[start : start + page])), *ids[start + page :]]


def check_bases(client: Client, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The same bases without a fork, all at once, twice: tokens up to the first that differs from the forked ones'.

    control_tokens: those on which the two runs without a fork agree, which is all that forked bases could.
    """
    client.flush()
    prompts = [record["ids"]["forks"][0]["input_ids"][: record["forks"][0]["prompt_tokens"]] for record in records]
    calls = [
        partial(client.generate, prompt, len(record["ids"]["base"]), logprobs=False)
        for prompt, record in zip(prompts, records, strict=True)
    ]
    plain = together(calls)
    client.flush()
    twice = together(calls)
    agreed = [_agreed(record["ids"]["base"], one.ids) for record, one in zip(records, plain, strict=True)]
    lengths = [len(record["ids"]["base"]) for record in records]
    return {
        "bases": len(records),
        "equal": sum(a == b for a, b in zip(agreed, lengths, strict=True)),
        "tokens_equal": sum(agreed),
        "control_equal": sum(a.ids == b.ids for a, b in zip(plain, twice, strict=True)),
        "control_tokens": sum(_agreed(a.ids, b.ids) for a, b in zip(plain, twice, strict=True)),
        "tokens": sum(lengths),
    }


def slowdown(client: Client, seed: int, shape: Shape) -> dict[str, Any]:
    """Seconds of the bases alone and with a fork of 31 tokens every 256; medians of three, in turns."""
    prompts = [prompt_of(seed * 100 + number, 64) for number in range(shape.bases)]
    settings: dict[str, dict[str, Any]] = {
        "alone": {"trigger": "none"},
        "forked": {"trigger": "every:256", "fork": {"max_tokens": 31}},
    }
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    forks = 0
    for turn in range(4):
        for name, values in settings.items():
            client.flush()
            start = time.perf_counter()
            calls = [partial(client.search, prompt, shape.tokens, values) for prompt in prompts]
            searches = together(calls)
            if turn:
                seconds[name].append(time.perf_counter() - start)
                forks += sum(len(client.record(search)["forks"]) for search in searches) if name == "forked" else 0
    alone, forked = statistics.median(seconds["alone"]), statistics.median(seconds["forked"])
    return {"alone_s": seconds["alone"], "forked_s": seconds["forked"], "slowdown": forked / alone - 1, "forks": forks}


def storm(client: Client, seed: int, shape: Shape) -> dict[str, Any]:
    """Three times the bases at once, every second client gone in the midst of it; then nothing may be left."""
    client.flush()
    before = client.state()["memory_usage"]
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
    return {**counts, "memory_equal": state["memory_usage"] == before, "before": before, "state": state}


def together_in(size: int, calls: Sequence[Any]) -> list[Any]:
    return [result for at in range(0, len(calls), size) for result in together(calls[at : at + size])]


def _share(compared: list[Compared], forks: list[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    total = sum(forks[one.fork][1]["prompt_tokens"] + forks[one.fork][1]["at_token"] for one in compared)
    return sum(one.reused for one in compared) / total if total else None


def _agreed(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
