"""Forks that write again what an earlier fork of their search wrote: whether to end one before it has.

Two forks that have said the same tokens so far may still end in different kernels, and the chance of that is learnt
from forks that ended whole, by how long they agreed with an earlier one. Ending a fork saves what it would still write;
it loses a kernel with that chance, worth a multiple of what the search has paid for each so far. Where a model's forks
never repeat an answer, one is ended only if its rest alone costs more than that. Pure functions of an ``Evidence``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LEAST_TOKENS = 64
"""Agreement below which nothing is concluded: greetings and import lines are alike in most answers."""
MOST_SEEN = 256
WHOLE_EVERY = 8
"""One in so many forks that would be ended is let go on, so that what is believed is still tested."""


class Whole(NamedTuple):
    """A fork that ended whole beside earlier ones. agreed: tokens, with the one it agreed with longest.

    same: it wrote a candidate that was there already.
    """

    agreed: int
    same: bool


class Evidence(NamedTuple):
    """seen: the latest forks of a model that ended whole. chosen: forks that were to be ended so far."""

    seen: tuple[Whole, ...] = ()
    chosen: int = 0

    def learnt(self, agreed: int, same: bool) -> Evidence:
        return self._replace(seen=(*self.seen, Whole(agreed, same))[-MOST_SEEN:])

    def chose(self) -> tuple[Evidence, bool]:
        """One more fork is to be ended; whether it really is, or let go on."""
        chosen = self.chosen + 1
        return self._replace(chosen=chosen), chosen % WHOLE_EVERY != 0


def agreement(ids: Sequence[int], earlier: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for at, (one, other) in enumerate(zip(ids, earlier, strict=False)):
        if one != other:
            return at
    return min(len(ids), len(earlier))


def chance_of_new(evidence: Evidence, agreed: int) -> float:
    """That a fork which has agreed for so long ends in a new candidate; 1 until a repeat was seen."""
    alike = [whole.same for whole in evidence.seen if whole.agreed >= agreed]
    same = sum(alike)
    return (1 + len(alike) - same) / (1 + len(alike))


def worth_ending(evidence: Evidence, worth: float, agreed: int, left: float, tokens: int, candidates: int) -> bool:
    """worth: of a new kernel, in what the search has paid for each so far; at 0 every repeat is ended.

    left: tokens that the fork would still write if it is a repeat.
    tokens, candidates: what the search has generated so far, base and forks, and its distinct candidates.
    """
    if agreed < LEAST_TOKENS:
        return False
    return left > chance_of_new(evidence, agreed) * worth * tokens / max(1, candidates)
