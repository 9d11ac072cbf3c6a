"""Which checks of several servers on one GPU run at the same time: what is timed runs alone, the rest side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

TIMED = frozenset({"restores", "slowdown"})
QUIET = frozenset({"slowdown"})  # a few per cent are asked of it: servers that still compile would hide them


class TimeIsOver(Exception):
    """The run's budget ended before a step's turn came."""


class Turn(NamedTuple):
    """A step of a server; `rank`: its place in the order of steps, then of cases. Smaller goes first."""

    step: str
    rank: tuple[int, int]


def may_start(turn: Turn, waiting: Sequence[Turn], running: Sequence[Turn], starting: int) -> bool:
    """A timed step wants nothing beside it and nothing smaller waiting; another gives way to a smaller timed one."""
    ahead = [one for one in waiting if one.rank < turn.rank]
    if turn.step in TIMED:
        return not running and not ahead and not (starting and turn.step in QUIET)
    return all(one.step not in TIMED for one in (*running, *ahead))


class Turns:
    """Given out to the threads of `cases` servers, all of which are starting."""

    def __init__(self, steps: Sequence[str], cases: int) -> None:
        self.steps, self._starting, self._over = list(steps), cases, False
        self._waiting: list[Turn] = []
        self._running: list[Turn] = []
        self._changed = threading.Condition()

    def started(self) -> None:
        """A server is up, or never will be."""
        with self._changed:
            self._starting -= 1
            self._changed.notify_all()

    def end(self) -> None:
        """Whoever waits, and asks from now on, gets TimeIsOver."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        return self._over

    @contextmanager
    def take(self, step: str, case: int) -> Iterator[int]:
        """A step's turn, waited for; how many servers were still starting then. Raises TimeIsOver."""
        turn = Turn(step, (self.steps.index(step), case))
        with self._changed:
            self._waiting.append(turn)
            while not self._over and not may_start(turn, self._waiting, self._running, self._starting):
                self._changed.wait()
            self._waiting.remove(turn)
            self._changed.notify_all()
            if self._over:
                raise TimeIsOver
            self._running.append(turn)
            starting = self._starting
        try:
            yield starting
        finally:
            with self._changed:
                self._running.remove(turn)
                self._changed.notify_all()
