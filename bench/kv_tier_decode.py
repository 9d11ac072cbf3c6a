"""Decodes with and without restores beside them: the same decodes, in windows that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from bench.kv_tier_client import Answer, Client, Decodes, random_ids
from bench.kv_tier_measure import Plan, from_device, from_tier, row
from bench.kv_tier_servers import pool_tokens

WINDOWS = ("alone", "own", "restored")


class Windows:
    """Decode rates by what is beside the decodes: nothing, hits of the own cache, restores, both at one pace."""

    def __init__(self, client: Client, plan: Plan, decodes: Decodes, kept: list[int], turns: list[list[int]]) -> None:
        self._client, self._plan, self._decodes = client, plan, decodes
        self._asked: dict[str, Iterator[list[int]]] = {"own": cycle([kept]), "restored": cycle(turns)}
        self.rates: dict[str, list[float]] = {name: [] for name in WINDOWS}
        self.answers: dict[str, list[Answer]] = {name: [] for name in WINDOWS}

    def measure(self, name: str) -> None:
        """One window: requests start `pace_s` apart, and the last one's answer ends it."""
        started = time.monotonic()
        self._decodes.rate()
        for number in range(round(self._plan.window_s / self._plan.pace_s)):
            time.sleep(max(0.0, started + number * self._plan.pace_s - time.monotonic()))
            if name in self._asked:
                self.answers[name].append(self._client.ask(next(self._asked[name])))
        time.sleep(max(0.0, started + self._plan.window_s - time.monotonic()))
        self.rates[name].append(self._decodes.rate())

    def slowdown(self, name: str, against: str) -> float:
        """Share of the decode rate lost, the mean over pairs of windows."""
        pairs = zip(self.rates[name], self.rates[against], strict=True)
        return round(1 - statistics.fmean(one / other for one, other in pairs), 4)


def measure_under_decode(client: Client, level: str, plan: Plan, seed: int, notes: list[str]) -> list[dict[str, Any]]:
    """Turns of three windows; which is first changes from turn to turn."""
    length = plan.loaded_tokens
    kept = random_ids(seed * 31_000, length)
    turns = [random_ids(seed * 31_000 + 1 + i, length) for i in range(pool_tokens(max(plan.prefixes)) // length + 2)]
    for prefix in [*turns, kept]:  # more than the pool holds: each is evicted before its turn comes again
        client.ask(prefix)
    decodes = Decodes(client, plan.decodes, plan.decode_tokens)
    time.sleep(plan.window_s)
    windows = Windows(client, plan, decodes, kept, turns)
    for pair in range(plan.pairs):
        for name in WINDOWS[pair % 3 :] + WINDOWS[: pair % 3]:
            windows.measure(name)
    alive = decodes.alive
    client.abort()
    decodes.join()
    if alive < plan.decodes:
        notes.append(f"{level}: only {alive} of {plan.decodes} decodes were still running at the end")
    return rows_of(client, level, plan, windows, notes)


def rows_of(client: Client, level: str, plan: Plan, windows: Windows, notes: list[str]) -> list[dict[str, Any]]:
    length, load = plan.loaded_tokens, f"{plan.decodes} decodes"
    rates = {name: [round(one, 1) for one in found] for name, found in windows.rates.items()}
    complete: list[tuple[str, str, Callable[[Answer, int], bool]]] = [
        ("own", "own", from_device),
        ("restored", level, from_tier),
    ]
    rows = []
    for name, booked, is_from in complete:
        answers = windows.answers[name]
        seconds = [answer.seconds for answer in answers if is_from(answer, length)]
        notes.append(f"{level}: {len(seconds)} of {len(answers)} requests beside decodes were {name}")
        if not seconds:
            continue
        more = {
            "decode_slowdown": windows.slowdown(name, "alone"),
            "decode_slowdown_beyond_own": windows.slowdown(name, "own"),
            "decode_tokens_per_s": rates,
            "every_s": plan.pace_s,
            "server": level,
        }
        rows.append(row(client, booked, length, load, seconds) | more)
    return rows
