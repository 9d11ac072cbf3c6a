"""Every prefix of bench.kv_tier computed once on a server: the recompute rows, and what is restored later."""

from __future__ import annotations

from typing import Any

from bench.kv_tier_client import Client, random_ids
from bench.kv_tier_measure import Plan, alone_prefixes, row


def warm_up(client: Client, plan: Plan, seed: int) -> None:
    """First requests pay for kernels and are not measured."""
    client.ask(random_ids(seed, 256))
    client.ask(random_ids(seed + 1, sorted(plan.prefixes)[1]))


def prewarm(client: Client, level: str, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """From an empty cache, longest first, which evicts all others; prefixes that were cached have no row."""
    client.flush()
    prefixes, filler = alone_prefixes(plan, seed)
    times: dict[int, float] = {}
    for length, prefix in prefixes.items():
        answer = client.ask(prefix)
        if answer.device + answer.tier < 16:
            times[length] = answer.seconds
    client.ask(filler)
    return [row(client, "recompute", length, "alone", [took], server=level) for length, took in sorted(times.items())]
