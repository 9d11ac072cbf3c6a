"""The fork checks of bench.models: forks against an empty cache, and the engine against itself without a fork."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

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


class Fork(NamedTuple):
    """One that ran to its end. `whole`: tokens of prompt and reasoning in its input, `prompt` of them the prompt's;
    `reused` were in the cache. `base`: its record's place."""

    base: int
    input_ids: list[int]
    output_ids: list[int]
    prompt: int
    whole: int
    reused: int


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
    """One row: forks equal to recomputation, what rounding cost, bases unchanged, and how much a wrong token shows.

    Its controls: `control`, the engine against itself, both from an empty cache in batches of other sizes;
    `reuse_prefilled` and `reuse_decoded`, prefixes of the forks' lengths that ordinary requests left in the cache.
    """
    start = time.monotonic()
    client.flush()
    records = search_all(client, seed, shape)
    forks = forks_of(records)
    inputs = [fork.input_ids for fork in forks]
    cached = by_base(client, forks, inputs)
    order = [at for offset in range(shape.forks) for at in range(offset, len(forks), shape.forks)]
    asked = [(fork.input_ids, len(fork.output_ids)) for fork in forks]
    fresh = from_empty_cache(client, asked, order, shape.bases)
    again = from_empty_cache(client, asked, order[shape.bases // 2 :] + order[: shape.bases // 2], 5)
    lost = [fork.whole - fork.reused for fork in forks]
    return {
        "forks": sum(len(record["forks"]) for record in records),
        "finished": len(forks),
        "states": sorted({fork["state"] for record in records for fork in record["forks"]}),
        "skipped": sum(record["forks_skipped"] for record in records),
        "compared": sum(one.cached < 64 for one in fresh),
        "equal": sum(fork.output_ids == one.ids for fork, one in zip(forks, fresh, strict=True)),
        **agreement(cached, fresh, inputs),
        "first_token_equal": sum(fork.output_ids[0] == one.ids[0] for fork, one in zip(forks, fresh, strict=True)),
        "reused_share": sum(fork.reused for fork in forks) / sum(fork.whole for fork in forks),
        "reused_mean": statistics.mean(fork.reused for fork in forks),
        "rounded_off_mean": statistics.mean(lost),
        "rounded_off_max": max(lost),
        "control": {
            "equal": sum(a.ids == b.ids for a, b in zip(fresh, again, strict=True)),
            **agreement(fresh, again, inputs),
        },
        "reuse_prefilled": reuse_prefilled(client, forks, fresh),
        "sensitivity": sensitivity(client, [forks[at].input_ids for at in range(0, len(forks), shape.forks)]),
        **check_bases(client, records, forks, order, shape.bases),
        "seconds": time.monotonic() - start,
    }


def forks_of(records: Sequence[dict[str, Any]]) -> list[Fork]:
    """Raises SpecGenError when none ran to its end: nothing could be compared."""
    found = [
        Fork(
            at,
            ids["input_ids"],
            ids["output_ids"],
            fork["prompt_tokens"],
            fork["prompt_tokens"] + fork["at_token"],
            fork["prefix_reused"],
        )
        for at, record in enumerate(records)
        for ids, fork in zip(record["ids"]["forks"], record["forks"], strict=True)
        if fork["state"] == "length"
    ]
    if not found:
        raise SpecGenError(f"none of {sum(len(record['forks']) for record in records)} forks ran to its end")
    return found


def from_empty_cache(
    client: Client, asked: Sequence[tuple[list[int], int]], order: Sequence[int], at_once: int
) -> list[Generated]:
    """Inputs and how many tokens to say, computed without a cached prefix, so many at once in this order."""
    found: dict[int, Generated] = {}
    for at in range(0, len(order), at_once):
        group = order[at : at + at_once]
        client.flush()
        found |= dict(zip(group, together([partial(client.generate, *asked[i]) for i in group]), strict=True))
    return [found[at] for at in range(len(asked))]


def by_base(client: Client, forks: Sequence[Fork], inputs: Sequence[list[int]]) -> list[Generated]:
    """The next token of each input with what is cached, those of one base at once."""
    found: dict[int, Generated] = {}
    for base in sorted({fork.base for fork in forks}):
        group = [at for at, fork in enumerate(forks) if fork.base == base]
        found |= dict(zip(group, together([partial(client.generate, inputs[at], 1) for at in group]), strict=True))
    return [found[at] for at in range(len(forks))]


def reuse_prefilled(client: Client, forks: Sequence[Fork], fresh: Sequence[Generated]) -> dict[str, Any]:
    """The forks' inputs after ordinary requests for their prefixes, shortest first: no fork, all KV from prefills.

    One token more than a fork reused is asked for: SGLang keeps none for the last (a page of one token keeps it).
    """
    client.flush()
    for fork in sorted(forks, key=lambda fork: (fork.base, fork.reused)):
        client.generate(fork.input_ids[: fork.reused + 1], 1)
    inputs = [fork.input_ids for fork in forks]
    found = by_base(client, forks, inputs)
    return {**agreement(found, fresh, inputs), "reused_mean": statistics.mean(one.cached for one in found)}


def reuse_decoded(
    client: Client, forks: Sequence[Fork], said: Sequence[list[int]], order: Sequence[int], at_once: int
) -> dict[str, Any]:
    """Inputs as the forks' where ordinary requests said the reasoning, which are the last that the server ran.

    `said`: a base's tokens without a fork. They may be others than the forked one's, so that these inputs are compared
    with their own recomputation. The prefix is KV of prompt and decoding, as a fork's.
    """
    inputs = [
        [*fork.input_ids[: fork.prompt], *said[fork.base][: fork.whole - fork.prompt], *fork.input_ids[fork.whole :]]
        for fork in forks
    ]
    found = by_base(client, forks, inputs)
    fresh = from_empty_cache(client, [(ids, 1) for ids in inputs], order, at_once)
    return {**agreement(found, fresh, inputs), "reused_mean": statistics.mean(one.cached for one in found)}


def agreement(
    first: Sequence[Generated], second: Sequence[Generated], inputs: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How far two computations of the same inputs are apart in their first token.

    `outside`: the lengths of those too far apart. GLM-5 attends to 2,048 tokens and chooses them in longer inputs only.
    """
    away = [_away(a, b) for a, b in zip(first, second, strict=True)]
    return {
        "inputs": len(away),
        "first_token_equal": sum(a.ids[0] == b.ids[0] for a, b in zip(first, second, strict=True)),
        "logprob_within": sum(one <= TOLERANCE for one in away),
        "logprob_max": max(away),
        "logprob_median": statistics.median(away),
        "outside": sorted(len(ids) for ids, one in zip(inputs, away, strict=True) if one > TOLERANCE),
    }


def _away(a: Generated, b: Generated) -> float:
    """How far b's logprob of a's first token is from a's; the least that b lists where it lists no such token."""
    least = min(b.first.values()) if b.first else float("-inf")
    return abs(a.logprobs[0] - b.first.get(a.ids[0], least))


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


def check_bases(
    client: Client, records: list[dict[str, Any]], forks: Sequence[Fork], order: Sequence[int], at_once: int
) -> dict[str, Any]:
    """The same bases without a fork, all at once, twice: tokens up to the first that differs from the forked ones'.

    control_tokens: those on which the two runs without a fork agree, which is all that forked bases could.
    """
    prompts = [record["ids"]["forks"][0]["input_ids"][: record["forks"][0]["prompt_tokens"]] for record in records]
    calls = [
        partial(client.generate, prompt, len(record["ids"]["base"]), logprobs=False)
        for prompt, record in zip(prompts, records, strict=True)
    ]
    client.flush()
    twice = together(calls)
    client.flush()
    plain = together(calls)
    decoded = reuse_decoded(client, forks, [one.ids for one in plain], order, at_once)
    agreed = [_agreed(record["ids"]["base"], one.ids) for record, one in zip(records, plain, strict=True)]
    lengths = [len(record["ids"]["base"]) for record in records]
    bases = {
        "bases": len(records),
        "equal": sum(a == b for a, b in zip(agreed, lengths, strict=True)),
        "tokens_equal": sum(agreed),
        "control_equal": sum(a.ids == b.ids for a, b in zip(plain, twice, strict=True)),
        "control_tokens": sum(_agreed(a.ids, b.ids) for a, b in zip(plain, twice, strict=True)),
        "tokens": sum(lengths),
    }
    return {"reuse_decoded": decoded, "bases": bases}


def _agreed(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
