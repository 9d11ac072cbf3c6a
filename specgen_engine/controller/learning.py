"""The adaptive trigger live: what is learnt of each family of tasks, kept in a file between runs of the server."""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from pathlib import Path

from specgen_engine.controller.adaptive import Costs, Family, View, dumps, loads, observed, wants_fork
from specgen_engine.controller.repeats import Evidence
from specgen_engine.errors import ConfigError

TRIGGER = "adaptive"
LEAST_WHOLE, MOST_WHOLE = 4, 64
"""Whole reasonings of a family: how many say something of the next one's length, and how many are remembered."""


class Learner:
    """Every fork of the server teaches; searches with the trigger ``adaptive`` ask. One event loop, no lock.

    path: the state's file, None keeps it in memory. repeats: of forks, for this life only. Raises ConfigError when the
    file is there but not usable.
    """

    def __init__(self, model: str, path: Path | None = None, costs: Costs | None = None) -> None:
        self.model, self.path, self.costs = model, path, costs or Costs()
        self.families: dict[str, Family] = {}
        self.repeats = Evidence()
        self._whole: dict[str, deque[int]] = {}
        self._dirty = False
        if path is not None and path.exists():
            try:
                self.families = loads(path.read_text(), str(path))
            except (OSError, ValueError) as error:
                raise ConfigError(f"--specgen-adaptive-state {path}: {error}") from None

    def family(self, task: str) -> str:
        return f"{self.model}/{task}"

    def wants(self, task: str, view: View, waiting: int, evaluators: int) -> bool:
        known = self.families.get(self.family(task), Family())
        return wants_fork(known, view, waiting, max(evaluators, 1), self.costs)

    def observe(self, task: str, view: View, speedup: float, fork_tokens: int) -> None:
        """A fork has ended: speedup of its candidate, 0 when it gave none, a known or a failing one."""
        name = self.family(task)
        known = self.families.get(name, Family())
        self.families[name] = observed(known, view.gap, view.best, speedup, max(fork_tokens, 1))
        self._dirty = True

    def observe_whole(self, task: str, tokens: int) -> None:
        """A reasoning that nobody cut has ended after so many tokens. Remembered for this life only."""
        self._whole.setdefault(self.family(task), deque(maxlen=MOST_WHOLE)).append(tokens)

    def expected_left(self, task: str, position: int) -> float:
        """Tokens until a reasoning that has come to `position` ends by itself, from those that were longer.

        Infinite while too few are known, or none of them was as long.
        """
        whole = self._whole.get(self.family(task), ())
        left = [tokens - position for tokens in whole if tokens > position]
        return sum(left) / len(left) if left and len(whole) >= LEAST_WHOLE else math.inf

    def answer_tokens(self, task: str) -> float:
        """Mean of the forks that have ended; 0 before the first, since the prior of the spacing is no measurement."""
        known, prior = self.families.get(self.family(task), Family()), Family()
        forks = known.forks - prior.forks
        return (known.fork_tokens - prior.fork_tokens) / forks if forks > 0 else 0.0

    def save(self) -> None:
        """Write the file whole, if anything was learnt since the last time."""
        if self.path is None or not self._dirty:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        with os.fdopen(handle, "w") as file:
            file.write(dumps(self.families))
        os.replace(temporary, self.path)
        self._dirty = False
