"""What the scheduler decides about forks: pure functions, no torch, the same answer on every tensor-parallel rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Fork(NamedTuple):
    """A waiting fork: its request id, its search, and the KV tokens it may need at most."""

    rid: str
    search: str
    tokens: int


class Load(NamedTuple):
    """What the scheduler sees when it builds a prefill batch. Counts of requests; KV pool sizes in tokens.

    promised_tokens: what running requests may still take. asked_tokens: what the waiting ordinary ones take at most.
    """

    ordinary_waiting: int
    ordinary_running: int
    forks_running: tuple[str, ...]
    pool_tokens: int
    free_tokens: int
    promised_tokens: int
    asked_tokens: int = 0


class Limits(NamedTuple):
    """Caps from the configuration (config.SchedulerConfig, config.ForkConfig)."""

    batch_share: float
    headroom: float
    per_search: int
    total: int
    max_running: int


def admissible_forks(load: Load, waiting: Sequence[Fork], limits: Limits) -> tuple[str, ...]:
    """Rids of the waiting forks that may join the next prefill batch, in order.

    None while an ordinary request waits. Forks take at most batch_share of max_running, and only KV that is free once
    every running request has got what it may still need (promised_tokens) and headroom of the pool stays untouched.
    """
    if load.ordinary_waiting:
        return ()
    slots = min(limits.total, max(1, int(limits.batch_share * limits.max_running))) - len(load.forks_running)
    budget = load.free_tokens - load.promised_tokens - int(limits.headroom * load.pool_tokens)
    per_search = Counter(load.forks_running)
    admitted = []
    for fork in waiting:
        if slots <= 0:
            break
        if fork.tokens > budget or per_search[fork.search] >= limits.per_search:
            continue
        admitted.append(fork.rid)
        per_search[fork.search] += 1
        slots -= 1
        budget -= fork.tokens
    return tuple(admitted)


def forks_in_the_way(load: Load) -> bool:
    """Whether running forks hold KV that waiting ordinary requests will want, so that all go before any is admitted.

    Admitting what fits beside the forks first, the rest once they are gone, staggers requests that would have started
    together: SGLang's estimate then admits more of them than their growth leaves room for, and retracts some
    (bench.engine_starved, requests sent one by one: 32 against 25 without forks; with this rule 26 against 23).
    """
    return bool(load.forks_running) and load.asked_tokens > load.free_tokens - load.promised_tokens


def forks_to_retract(load: Load, ordinary_admitted: bool) -> int:
    """How many running forks to retract so that a waiting ordinary request is not kept out by them: all of them.

    One a step would let the rest slow every step that the ordinary request waits for.
    """
    return len(load.forks_running) if load.ordinary_waiting and not ordinary_admitted else 0


def base_steps_aside(step: int, share: float, cycle: int = 64) -> bool:
    """Whether a base request sits out this step, while forks of its own decode: it takes part in `share` of each cycle.

    step counts the steps since the first of its forks joined. share 1 never sits out: forks then cost the base only
    what a larger batch costs. Less may be worth it where a step's time grows with the batch (a CPU, a saturated GPU):
    what the base reasons while a fork is about to succeed is wasted.
    """
    return share < 1 and step % cycle >= round(share * cycle)


def keep_order(order: Sequence[int], is_fork: Sequence[bool]) -> list[int]:
    """SGLang's retraction order (first kept longest) with every fork behind every ordinary request, else unchanged."""
    return [i for i in order if not is_fork[i]] + [i for i in order if is_fork[i]]
