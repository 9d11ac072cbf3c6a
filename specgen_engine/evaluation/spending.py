"""Where the seconds of an evaluation go: by stage, the candidate's own, and the harness's by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .base import Stage


class Spending:
    """stages: seconds by stage, waiting for the GPU left out. own_s: the candidate's. steps: the harness's.

    announce is told every stage at its start. asked: time.monotonic() of the request, when the last one's remains
    were still being cleared away, perhaps; until now it waited.
    """

    def __init__(self, announce: Callable[[Stage], None], asked: float | None = None) -> None:
        self._announce = announce
        now = time.monotonic()
        self._started = now if asked is None else asked
        self.stages: dict[str, float] = {}
        self.steps: dict[str, float] = {}
        self.waited_s, self.own_s = now - self._started, 0.0

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        self._announce(stage)
        start, waited = time.monotonic(), self.waited_s
        try:
            yield
        finally:
            self.stages[stage] = round(time.monotonic() - start - (self.waited_s - waited), 4)

    @contextmanager
    def own(self) -> Iterator[None]:
        """The candidate's own time: what is spent in here is no overhead of the harness."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.own_s += time.monotonic() - start

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """The harness's time, by name; the candidate's own, waiting and inner steps within are left out."""
        start, known = time.monotonic(), self._known()
        try:
            yield
        finally:
            spent = time.monotonic() - start - (self._known() - known)
            self.steps[name] = self.steps.get(name, 0.0) + max(0.0, spent)

    def _known(self) -> float:
        return self.own_s + self.waited_s + sum(self.steps.values())

    def overhead(self) -> dict[str, float]:
        """Seconds by step until now, "other" for what no step claims."""
        other = time.monotonic() - self._started - self._known()
        found = self.steps | {"other": max(0.0, other)}
        return {name: round(seconds, 4) for name, seconds in found.items()}
