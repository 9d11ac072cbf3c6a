"""Every prefix of bench.kv_tier computed once on every server, on all GPUs at once: the recompute rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.kv_tier_client import Client, random_ids
from bench.kv_tier_measure import Plan, alone_prefixes, row


def prewarm(clients: dict[str, Client], plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Rows of the tier's server, which then has its GPU to itself; `off`, on the same GPU, waits for it.

    The other GPU computes the same for `host` meanwhile. A first request pays for kernels and is not measured.
    """
    levels = [level for level in clients if level != "off"]
    with ThreadPoolExecutor(len(levels)) as threads:
        found = {level: threads.submit(_compute, clients[level], plan, seed) for level in levels}
        seconds = {level: future.result() for level, future in found.items()}
    off = clients["off"]
    off.ask(random_ids(seed, 256))
    off.ask(random_ids(seed + 1, sorted(plan.prefixes)[1]))
    level = levels[0]
    return [
        row(clients[level], "recompute", length, "alone", [took], server=level)
        for length, took in sorted(seconds[level].items())
    ]


def _compute(client: Client, plan: Plan, seed: int) -> dict[int, float]:
    """Seconds by prefix, longest first, which evicts all others; prefixes that were cached are left out."""
    client.ask(random_ids(seed, 256))
    client.ask(random_ids(seed + 1, sorted(plan.prefixes)[1]))
    prefixes, filler = alone_prefixes(plan, seed)
    times: dict[int, float] = {}
    for length, prefix in prefixes.items():
        answer = client.ask(prefix)
        if answer.device + answer.tier < 16:
            times[length] = answer.seconds
    client.ask(filler)
    return times
