"""Where the evaluator GPUs' time went: GPU-seconds by search, stage and outcome, and each GPU's busy share."""

from __future__ import annotations

from collections import defaultdict, deque
from enum import StrEnum
from typing import NamedTuple

Gpu = int | str
"""Its number, or in a live pool its name (host and device)."""

REMEMBERED = 256  # stretches of work of a GPU, apart from each other, that a job may still overlap


class Outcome(StrEnum):
    """useful: its result came in time.  superseded: its reasoning had gone on without it.  cancelled: killed."""

    USEFUL = "useful"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"


class Spent(NamedTuple):
    search: str
    stage: str
    outcome: Outcome


class Account:
    """Busy time only: correctness, timing and profile work on a GPU. Compiling, start-up and role switches are idle.

    Not thread-safe; used from the pool's event loop. Times are seconds of one monotonic clock.
    """

    def __init__(self) -> None:
        self.seconds: dict[Spent, float] = defaultdict(float)
        self._busy: dict[Gpu, float] = {}
        self._present: dict[Gpu, float] = {}
        self._joined: dict[Gpu, float] = {}
        self._worked: dict[Gpu, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def join(self, gpu: Gpu, now: float) -> None:
        """A GPU is in the pool from now on. Raises ValueError when it is already."""
        if gpu in self._joined:
            raise ValueError(f"gpu={gpu}: it is in the pool already")
        self._joined[gpu] = now
        self._busy.setdefault(gpu, 0.0)
        self._present.setdefault(gpu, 0.0)

    def leave(self, gpu: Gpu, now: float) -> None:
        """Its busy share stays, counted over the time it was there. Raises ValueError when it is not in the pool."""
        if gpu not in self._joined:
            raise ValueError(f"gpu={gpu}: it is not in the pool")
        self._present[gpu] += now - self._joined.pop(gpu)

    def record(
        self, search: str, stage: str, outcome: Outcome, gpu: Gpu, seconds: float, ended: float | None = None
    ) -> None:
        """ended: when that work ended, none before the last recorded one's; needed where several workers share a GPU,
        which is busy while one of them is: each search pays for its own seconds, the GPU's share counts them once.

        Raises ValueError when seconds is negative or the GPU never joined.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds={seconds}: use a number of at least 0")
        if gpu not in self._busy:
            raise ValueError(f"gpu={gpu}: it never joined the pool")
        self.seconds[Spent(search, stage, outcome)] += seconds
        self._busy[gpu] += seconds if ended is None else self._not_yet_counted(gpu, ended - seconds, ended)

    def _not_yet_counted(self, gpu: Gpu, began: float, ended: float) -> float:
        """Of [began, ended], the seconds in which no recorded work of this GPU lies."""
        worked, counted = self._worked[gpu], 0.0
        while worked and worked[-1][1] >= began:
            low, high = worked.pop()
            counted += high - low
            began, ended = min(began, low), max(ended, high)
        worked.append((began, ended))
        return ended - began - counted

    def utilisation(self, now: float) -> dict[Gpu, float]:
        """Busy share by GPU, 0 to 1, over the time that each was in the pool; 0 for one that has just joined."""
        shares = {}
        for gpu, busy in self._busy.items():
            present = self._present[gpu] + (now - self._joined[gpu] if gpu in self._joined else 0.0)
            shares[gpu] = busy / present if present > 0 else 0.0
        return shares

    def by_search(self) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(float)
        for spent, seconds in self.seconds.items():
            totals[spent.search] += seconds
        return dict(totals)

    def by_outcome(self) -> dict[Outcome, float]:
        totals = dict.fromkeys(Outcome, 0.0)
        for spent, seconds in self.seconds.items():
            totals[spent.outcome] += seconds
        return totals

    def total(self) -> float:
        return sum(self.seconds.values())
