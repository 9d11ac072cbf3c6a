"""What the tier keeps, writes and fetches: pure functions, no torch and no clock, the same answer on every rank.

Expected reuse is what decides. A live search forks from its newest prefix again and again, and retracts and resumes
there; once it has ended, what it may still share with the next iteration is its prompt. A fork's own answer is read by
nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Source(Enum):
    """Whose tokens a node of the radix tree holds."""

    PLAIN = "plain"  # a request outside any search
    BASE = "base"  # a base request: prompt and reasoning
    FORK = "fork"  # what a fork has beyond its prefix


class Segment(NamedTuple):
    """A node of the tree. `live`: its search runs. `hits`: times it was found. `last_used`: seconds, any origin."""

    source: Source
    live: bool
    hits: int
    last_used: float


class Destination(Enum):
    PEER = "peer"
    DROP = "drop"


class Waiting(NamedTuple):
    """A queued request. `tokens`: of its prefix that only the tier holds."""

    rid: str
    is_fork: bool
    tokens: int


REUSE = {
    # (source, live): expected reads of a node before its search, or the server's next requests, are done with it.
    (Source.BASE, True): 8.0,
    (Source.PLAIN, True): 1.0,
    (Source.PLAIN, False): 1.0,
    (Source.BASE, False): 0.5,
    (Source.FORK, True): 0.1,
    (Source.FORK, False): 0.0,
}


def expected_reuse(segment: Segment) -> float:
    """Reads that are still to come; what was read before is a little likelier to be read again."""
    return REUSE[segment.source, segment.live] * (1 + min(segment.hits, 4) / 8)


def eviction_rank(segment: Segment) -> tuple[float, float]:
    """Evict the smallest first, from the GPU and from the tier: fork points of live searches outrank dead ones."""
    return REUSE[segment.source, segment.live], segment.last_used


def destination(source: Source, finished: bool) -> Destination:
    """Where new tokens of a request go when it publishes them. Only what the tree has not yet is ever written.

    A fork's answer is dropped, and so is what a finished base adds after its last fork point: its search is over.
    """
    if source is Source.FORK or (source is Source.BASE and finished):
        return Destination.DROP
    return Destination.PEER


def spare_tokens(free: int, evictable: int, promised: int) -> int:
    """KV that prefetches may take: free, with forks' answers, and beyond what running requests were promised.

    What a prefetch takes can't be evicted until it has arrived; then it can be, like any other prefix.
    """
    return max(0, min(free, free + evictable - promised))


def prefetches(waiting: Sequence[Waiting], free_tokens: int, threshold: int = 64) -> list[str]:
    """Requests whose prefixes are fetched before they are admitted, in queue order, ordinary ones first.

    Only into KV that is free or holds a fork's answer: nothing that may be read again is evicted. A prefix below
    `threshold` tokens is not worth a transfer.
    """
    chosen = []
    for request in sorted(waiting, key=lambda request: request.is_fork):
        if threshold <= request.tokens <= free_tokens:
            chosen.append(request.rid)
            free_tokens -= request.tokens
    return chosen
