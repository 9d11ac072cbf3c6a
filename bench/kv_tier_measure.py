"""What bench.kv_tier measures on a server: alone, many at once, beside decodes."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

from bench.kv_tier_client import Answer, Client, Decodes, random_ids

COMPLETE = 0.97  # share of a prefix that must have come from the level a sample is booked under


class Plan(NamedTuple):
    """`crowd` prefixes of `crowd_tokens` at once; `decodes` generations of `decode_tokens` beside `loaded_tokens`."""

    prefixes: tuple[int, ...]
    rounds: int
    crowd: int
    crowd_tokens: int
    decodes: int
    decode_tokens: int
    loaded_tokens: int
    window_s: float


def row(client: Client, level: str, prefix: int, load: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    """`gbps`: the prefix's bytes over the whole time to first token, a lower bound of what the tier moves."""
    middle = statistics.median(seconds)
    return {
        "level": level,
        "prefix_tokens": prefix,
        "load": load,
        "ttft_ms": round(middle * 1e3, 3),
        "ttft_ms_all": [round(one * 1e3, 3) for one in seconds],
        "gbps": None if level == "recompute" else round(prefix * client.bytes_per_token / middle / 1e9, 2),
        "decode_slowdown": None,
        **more,
    }


def from_tier(answer: Answer, prefix: int) -> bool:
    return answer.tier >= COMPLETE * prefix


def from_device(answer: Answer, prefix: int) -> bool:
    return answer.device >= COMPLETE * prefix


def measure_alone(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """One request at a time, longest prefix first, which evicts all others; a filler at the end evicts it in turn."""
    order = sorted(plan.prefixes, reverse=True)
    prefixes = {length: random_ids(seed * 1_000 + length, length) for length in order}
    filler = random_ids(seed * 1_000 + 1, order[0] + order[0] // 8 - sum(order[1:]))
    times: dict[tuple[str, int], list[float]] = {}

    def note(kind: str, length: int, answer: Answer, complete: bool) -> None:
        if complete:
            times.setdefault((kind, length), []).append(answer.seconds)

    client.ask(random_ids(seed, 256))  # what a first request costs is not measured
    for length in order:
        answer = client.ask(prefixes[length])
        note("recompute", length, answer, answer.device + answer.tier < 16)
    client.ask(filler)
    for _ in range(plan.rounds):
        for length in order:
            answer = client.ask(prefixes[length])
            note(level, length, answer, from_tier(answer, length))
            answer = client.ask(prefixes[length])
            note("own", length, answer, from_device(answer, length))
        client.ask(filler)
    missing = [length for length in order if (level, length) not in times]
    if missing:
        notes.append(f"{level}: no complete restore alone of {missing} tokens")
    return [row(client, one, length, "alone", found, server=level) for (one, length), found in sorted(times.items())]


def measure_at_once(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Many restores at once; then the same prefixes from the own cache."""
    evictor = random_ids(seed * 1_000 + max(plan.prefixes), max(plan.prefixes))
    crowd = [random_ids(seed * 77_000 + i, plan.crowd_tokens) for i in range(plan.crowd)]
    client.ask(evictor)
    client.ask_all(crowd)
    rows = []
    for _ in range(2):
        client.ask(evictor)
        answers, restore_s = client.ask_all(crowd)
        complete = sum(from_tier(answer, plan.crowd_tokens) for answer in answers)
        again, own_s = client.ask_all(crowd)
        kept = sum(from_device(answer, plan.crowd_tokens) for answer in again)
        load = f"{plan.crowd} at once"
        moved = sum(answer.tier for answer in answers) * client.bytes_per_token / restore_s / 1e9
        rows += [
            row(client, level, plan.crowd_tokens, load, [a.seconds for a in answers], server=level)
            | {"gbps": round(moved, 2), "all_ms": round(restore_s * 1e3, 2), "complete": complete},
            row(client, "own", plan.crowd_tokens, load, [a.seconds for a in again], server=level)
            | {"all_ms": round(own_s * 1e3, 2), "complete": kept},
        ]
    return rows


def measure_under_decode(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Restores one after the other beside decodes; the decode rate beside them, beside own-cache hits, and alone."""
    length = plan.loaded_tokens
    cycle = [random_ids(seed * 31_000 + i, length) for i in range(8)]
    evictor = random_ids(seed * 1_000 + max(plan.prefixes), max(plan.prefixes))
    for prefix in cycle:
        client.ask(prefix)
    client.ask(evictor)
    decodes = Decodes(client, plan.decodes, plan.decode_tokens)
    time.sleep(plan.window_s / 4)
    decodes.rate()
    time.sleep(plan.window_s / 2)
    alone = decodes.rate()
    pause = 0.1
    restored = _ask_for(client, cycle, plan.window_s, pause)
    beside_restores = decodes.rate()
    own = _ask_for(client, [cycle[(len(restored) - 1) % len(cycle)]], plan.window_s, pause)
    beside_own = decodes.rate()
    alive = decodes.alive
    decodes.join()
    if alive < plan.decodes:
        notes.append(f"{level}: only {alive} of {plan.decodes} decodes were still running at the end")
    load = f"{plan.decodes} decodes"
    complete = [answer.seconds for answer in restored if from_tier(answer, length)]
    hits = [answer.seconds for answer in own if from_device(answer, length)]
    rates: dict[str, Any] = {"decode_alone": round(alone, 1), "decode_beside": round(beside_restores, 1)}
    rates |= {"decode_beside_own": round(beside_own, 1), "asked": len(restored), "server": level}
    slowdown = round(1 - beside_restores / beside_own, 4) if beside_own else None
    rows = []
    if complete:
        rows.append(row(client, level, length, load, complete, **rates) | {"decode_slowdown": slowdown})
    if hits:
        rows.append(row(client, "own", length, load, hits, server=level))
    notes.append(f"{level}: {len(complete)} of {len(restored)} restores beside decodes were complete")
    return rows


def _ask_for(client: Client, cycle: list[list[int]], seconds: float, pause_s: float) -> list[Answer]:
    answers: list[Answer] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answers.append(client.ask(cycle[len(answers) % len(cycle)]))
        time.sleep(pause_s)
    return answers
