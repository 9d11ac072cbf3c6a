"""What bench.kv_tier measures on an idle server: one restore at a time, and many at once."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from bench.kv_tier_client import Answer, Client, Loads, random_ids

COMPLETE = 0.97  # share of a prefix that must have come from the level a sample is booked under


class Plan(NamedTuple):
    """What is asked for.

    prefixes, rounds: restores alone. crowd: so many prefixes of `crowd_tokens` at once.
    decodes: generations beside which `loaded_tokens` are restored every `pace_s`, in `pairs` of windows of `window_s`;
    they have `decode_tokens` each. searches: see bench.kv_tier_searches, `steps` to a search.
    """

    prefixes: tuple[int, ...]
    rounds: int
    crowd: int
    crowd_tokens: int
    decodes: int
    decode_tokens: int
    loaded_tokens: int
    pairs: int
    window_s: float
    pace_s: float
    searches: int
    steps: int
    search_tokens: int


class Sample(NamedTuple):
    seconds: float
    loads: Loads


def row(client: Client, level: str, prefix: int, load: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    """`gbps` stays None where nothing was loaded."""
    return {
        "level": level,
        "prefix_tokens": prefix,
        "load": load,
        "ttft_ms": round(statistics.median(seconds) * 1e3, 3),
        "ttft_ms_all": [round(one * 1e3, 3) for one in seconds],
        "gbps": None,
        "decode_slowdown": None,
        **more,
    }


def loaded(client: Client, found: list[Loads]) -> dict[str, Any]:
    """Of loads: bytes a second of stream time, milliseconds of it, and what the tier's scheduler spent beside it."""
    tokens, seconds = sum(one.tokens for one in found), sum(one.seconds for one in found)
    row = {
        "gbps": round(tokens * client.bytes_per_token / seconds / 1e9, 2) if seconds else None,
        "load_ms": round(seconds / len(found) * 1e3, 3) if seconds else None,
        "loaded_tokens": tokens,
    }
    for name in ("admission_s", "check_s", "launch_s"):
        spent = [value for one in found if (value := getattr(one, name)) is not None]
        row[name.removesuffix("s") + "ms"] = round(sum(spent) / len(found) * 1e3, 3) if spent else None
    return row


def from_tier(answer: Answer, prefix: int) -> bool:
    return answer.tier >= COMPLETE * prefix


def from_device(answer: Answer, prefix: int) -> bool:
    return answer.device >= COMPLETE * prefix


def alone_prefixes(plan: Plan, seed: int) -> tuple[dict[int, list[int]], list[int]]:
    """({length: prefix}, longest first; a filler that evicts what is left of them)."""
    order = sorted(plan.prefixes, reverse=True)
    prefixes = {length: random_ids(seed * 1_000 + length, length) for length in order}
    return prefixes, random_ids(seed * 1_000 + 1, order[0] + order[0] // 8 - sum(order[1:]))


def measure_alone(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """One request at a time, after prewarm(): longest prefix first, which evicts all others, then the filler."""
    prefixes, filler = alone_prefixes(plan, seed)
    restored: dict[int, list[Sample]] = {}
    own: dict[int, list[float]] = {}
    for _ in range(plan.rounds):
        for length, prefix in prefixes.items():
            before = client.loads()
            answer = client.ask(prefix)
            if from_tier(answer, length):
                sample = Sample(answer.seconds, client.loads_of(before, answer.tier))
                restored.setdefault(length, []).append(sample)
            answer = client.ask(prefix)
            if from_device(answer, length):
                own.setdefault(length, []).append(answer.seconds)
        client.ask(filler)
    if missing := [length for length in prefixes if length not in restored]:
        notes.append(f"{level}: no complete restore alone of {missing} tokens")
    rows = [row(client, "own", length, "alone", seconds, server=level) for length, seconds in sorted(own.items())]
    for length, samples in sorted(restored.items()):
        seconds = [one.seconds for one in samples]
        more = loaded(client, [one.loads for one in samples])
        if length in own:
            beyond = statistics.median(seconds) - statistics.median(own[length])
            more["beyond_own_ms"] = round(beyond * 1e3, 3)
        rows.append(row(client, level, length, "alone", seconds, server=level) | more)
    return rows


def measure_at_once(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Many restores at once; then the same prefixes from the own cache."""
    evictor = alone_prefixes(plan, seed)[0][max(plan.prefixes)]
    crowd = [random_ids(seed * 77_000 + i, plan.crowd_tokens) for i in range(plan.crowd)]
    client.ask(evictor)
    client.ask_all(crowd)
    rows, load = [], f"{plan.crowd} at once"
    for _ in range(2):
        client.ask(evictor)
        before = client.loads()
        answers, restore_s = client.ask_all(crowd)
        moved = client.loads_of(before, sum(answer.tier for answer in answers))
        complete = sum(from_tier(answer, plan.crowd_tokens) for answer in answers)
        again, own_s = client.ask_all(crowd)
        kept = sum(from_device(answer, plan.crowd_tokens) for answer in again)
        rows += [
            row(client, level, plan.crowd_tokens, load, [a.seconds for a in answers], server=level)
            | loaded(client, [moved])
            | {"all_ms": round(restore_s * 1e3, 2), "complete": complete},
            row(client, "own", plan.crowd_tokens, load, [a.seconds for a in again], server=level)
            | {"all_ms": round(own_s * 1e3, 2), "complete": kept},
        ]
    return rows
