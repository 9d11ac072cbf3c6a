"""The adaptive trigger live: what is learnt of each family of tasks, kept in a file between runs of the server."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from specgen_engine.controller.adaptive import Costs, Family, View, dumps, loads, observed, wants_fork
from specgen_engine.errors import ConfigError

TRIGGER = "adaptive"


class Learner:
    """Every fork of the server teaches; searches with the trigger ``adaptive`` ask. One event loop, no lock.

    path: the state's file, None keeps it in memory. Raises ConfigError when the file is there but not usable.
    """

    def __init__(self, model: str, path: Path | None = None, costs: Costs | None = None) -> None:
        self.model, self.path, self.costs = model, path, costs or Costs()
        self.families: dict[str, Family] = {}
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
