"""The fork checks of bench.models: forks against an empty cache, and the engine against itself without a fork."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from bench.models_client import Client, Generated, together
from bench.models_compare import agreed, agreement, distance, other_page, paired
from specgen_engine.errors import SpecGenError

BASES, FORKS_EACH, FORK_TOKENS = 8, 8, 16
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


def check_forks(client: Client, seed: int, shape: Shape, row: dict[str, Any]) -> dict[str, Any]:
    """Forks equal to recomputation, what rounding cost, bases unchanged, and how much a wrong token shows.

    `row` is filled as it goes, so that what is known stays where the rest is cut off. Its controls: `control`, the
    engine against itself, both from an empty cache in batches of other sizes; `reuse_prefilled` and `reuse_decoded`,
    prefixes of the forks' lengths that ordinary requests left in the cache; `paired` sets them beside the forks.
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
    row |= {**of_searches(records, forks, fresh), **agreement(cached, fresh, inputs)}
    row["first_token_equal"] = sum(f.output_ids[0] == one.ids[0] for f, one in zip(forks, fresh, strict=True))
    again = from_empty_cache(client, asked, order[shape.bases // 2 :] + order[: shape.bases // 2], 5)
    row["control"] = {
        "equal": sum(a.ids == b.ids for a, b in zip(fresh, again, strict=True)),
        "agreed": [agreed(a.ids, b.ids) for a, b in zip(fresh, again, strict=True)],
        **agreement(fresh, again, inputs),
    }
    row["reuse_prefilled"] = reuse_prefilled(client, forks, fresh)
    row |= sensitivity(client, forks[:: shape.forks])
    row |= check_bases(client, records, forks, order, shape.bases)
    controls = ("control", "reuse_prefilled", "reuse_decoded")
    row["paired"] = {name: paired(row, row[name]) for name in controls}
    row["seconds"] = time.monotonic() - start
    return row


def of_searches(records: Sequence[dict[str, Any]], forks: Sequence[Fork], fresh: Sequence[Generated]) -> dict[str, Any]:
    """What became of the forks, what they reused, and their tokens against those from an empty cache."""
    lost = [fork.whole - fork.reused for fork in forks]
    return {
        "forks": sum(len(record["forks"]) for record in records),
        "finished": len(forks),
        "states": sorted({fork["state"] for record in records for fork in record["forks"]}),
        "skipped": sum(record["forks_skipped"] for record in records),
        "compared": sum(one.cached < 64 for one in fresh),
        "equal": sum(fork.output_ids == one.ids for fork, one in zip(forks, fresh, strict=True)),
        "agreed": [agreed(fork.output_ids, one.ids) for fork, one in zip(forks, fresh, strict=True)],
        "lengths": [len(fork.input_ids) for fork in forks],
        "reused_share": sum(fork.reused for fork in forks) / sum(fork.whole for fork in forks),
        "reused_mean": statistics.mean(fork.reused for fork in forks),
        "rounded_off_mean": statistics.mean(lost),
        "rounded_off_max": max(lost),
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


def sensitivity(client: Client, forks: Sequence[Fork]) -> dict[str, Any]:
    """How far the first token's logprob moves when a page of 64 tokens in the prefix is another: what errors do.

    `sensitivity`: one in the middle; `sensitivity_end`: the last that the fork reused, where DeepSeek-V4's window is.
    """
    client.flush()
    right = together([partial(client.generate, fork.input_ids, 1) for fork in forks])
    starts = {
        "sensitivity": [len(fork.input_ids) // 2 for fork in forks],
        "sensitivity_end": [max(0, fork.reused - 64) for fork in forks],
    }
    rows = {}
    for name, places in starts.items():
        client.flush()
        changed = [other_page(fork.input_ids, place) for fork, place in zip(forks, places, strict=True)]
        wrong = together([partial(client.generate, ids, 1) for ids in changed])
        shifts = [distance(a, b) for a, b in zip(right, wrong, strict=True)]
        rows[name] = {
            "inputs": len(shifts),
            "same_token": sum(a.ids == b.ids for a, b in zip(right, wrong, strict=True)),
            "shift_median": statistics.median(shifts),
            "shift_min": min(shifts),
        }
    return rows


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
    same = [agreed(record["ids"]["base"], one.ids) for record, one in zip(records, plain, strict=True)]
    lengths = [len(record["ids"]["base"]) for record in records]
    bases = {
        "bases": len(records),
        "equal": sum(a == b for a, b in zip(same, lengths, strict=True)),
        "tokens_equal": sum(same),
        "control_equal": sum(a.ids == b.ids for a, b in zip(plain, twice, strict=True)),
        "control_tokens": sum(agreed(a.ids, b.ids) for a, b in zip(plain, twice, strict=True)),
        "tokens": sum(lengths),
    }
    return {"reuse_decoded": decoded, "bases": bases}
