"""Termination: when a search has a kernel good enough to end the reasoning.

A criterion is a pure function of the verdicts so far. Only a correct candidate can be accepted, whatever the criterion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from specgen_engine.evaluation.base import Status

DEFAULT = "plateau:3"
PLATEAU_GAIN = 1.05
MAX_SPEEDUP = 100_000.0
MAX_VERDICTS = 10_000


@dataclass(frozen=True, slots=True)
class Scored:
    """One verdict as the criterion sees it; order counts verdicts of the search in the order they came."""

    hash: str
    status: Status
    speedup: float | None
    source: Literal["fork", "base", "draft"]
    order: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Accept the candidate with this hash; reason is one line for people."""

    hash: str
    reason: str


class Criterion(Protocol):
    """Says of the verdicts so far whether the reasoning ends, and with which candidate."""

    @property
    def spec(self) -> str: ...

    def decide(self, scored: Sequence[Scored]) -> Decision | None: ...


def _usable(one: Scored) -> bool:
    return one.status is Status.CORRECT and one.speedup is not None and math.isfinite(one.speedup)


def best(scored: Iterable[Scored]) -> Scored | None:
    """The fastest correct candidate, the earlier one of two equals; None when none is correct."""
    return max((one for one in scored if _usable(one)), key=lambda one: (one.speedup or 0.0, -one.order), default=None)


def _verdicts(scored: Sequence[Scored]) -> list[Scored]:
    """In the order they came; a cancelled evaluation says nothing of its candidate and doesn't count."""
    return sorted((one for one in scored if one.status is not Status.CANCELLED), key=lambda one: one.order)


@dataclass(frozen=True, slots=True)
class Never:
    """Spec ``none``: the reasoning runs to its own end."""

    spec: str = "none"

    def decide(self, scored: Sequence[Scored]) -> Decision | None:
        return None


@dataclass(frozen=True, slots=True)
class FirstCorrect:
    """Spec ``correct``: the first correct candidate, fast or slow."""

    spec: str = "correct"

    def decide(self, scored: Sequence[Scored]) -> Decision | None:
        first = next((one for one in _verdicts(scored) if _usable(one)), None)
        return None if first is None else Decision(first.hash, f"first correct candidate, {first.speedup:.3g}x")


@dataclass(frozen=True, slots=True)
class Speedup:
    """Spec ``speedup:X``: a correct candidate at least X times as fast as the reference."""

    target: float

    @property
    def spec(self) -> str:
        return f"speedup:{self.target:g}"

    def decide(self, scored: Sequence[Scored]) -> Decision | None:
        top = best(scored)
        if top is None or top.speedup is None or top.speedup < self.target:
            return None
        return Decision(top.hash, f"speed-up {top.speedup:.3g}x reaches {self.target:g}x")


@dataclass(frozen=True, slots=True)
class BestOf:
    """Spec ``best_of:K``: the best correct candidate once K verdicts are there; later ones while none is correct."""

    verdicts: int

    @property
    def spec(self) -> str:
        return f"best_of:{self.verdicts}"

    def decide(self, scored: Sequence[Scored]) -> Decision | None:
        count, top = len(_verdicts(scored)), best(scored)
        if count < self.verdicts or top is None:
            return None
        return Decision(top.hash, f"best of {count} verdicts, {top.speedup:.3g}x")


@dataclass(frozen=True, slots=True)
class Plateau:
    """Spec ``plateau:K``: a correct candidate with speed-up > 1, then K verdicts in a row without 5 % gain over it.

    A gain in small steps counts once their sum reaches 5 % of the candidate that the count started from.
    """

    patience: int

    @property
    def spec(self) -> str:
        return f"plateau:{self.patience}"

    def decide(self, scored: Sequence[Scored]) -> Decision | None:
        mark, since = 0.0, 0
        for one in _verdicts(scored):
            speed = one.speedup if _usable(one) and one.speedup is not None else 0.0
            if speed > 1.0 and speed >= mark * PLATEAU_GAIN:
                mark, since = speed, 0
            elif mark:
                since += 1
        top = best(scored)
        if since < self.patience or top is None:
            return None
        return Decision(top.hash, f"{since} verdicts without 5 % gain, best {top.speedup:.3g}x")


def _number(text: str, low: float, high: float, example: str, whole: bool) -> float:
    remedy = f"it needs a {'whole ' if whole else ''}number from {low:g} to {high:g}, as in {example}"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ValueError(remedy) from None
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(remedy)
    return value


def _criterion(spec: str) -> Criterion:
    name, colon, argument = spec.partition(":")
    if name in ("none", "correct"):
        if colon:
            raise ValueError(f"{name} takes no argument; use {name}")
        return Never() if name == "none" else FirstCorrect()
    if name == "speedup":
        return Speedup(_number(argument, 0.01, MAX_SPEEDUP, "speedup:1.5", whole=False))
    if name == "best_of":
        return BestOf(int(_number(argument, 1, MAX_VERDICTS, "best_of:4", whole=True)))
    if name == "plateau":
        return Plateau(int(_number(argument, 1, MAX_VERDICTS, "plateau:3", whole=True)))
    raise ValueError("no such criterion; use correct, speedup:1.5, best_of:4, plateau:3 or none")


def parse_termination(spec: str, field: str = "termination") -> Criterion:
    """Criterion of a spec: ``correct``, ``speedup:1.5``, ``best_of:4``, ``plateau:3`` (the default) or ``none``.

    Raises ValueError with the field, the value and the remedy.
    """
    try:
        return _criterion(spec.strip() if isinstance(spec, str) else "")
    except ValueError as error:
        raise ValueError(f"{field}={spec!r}: {error}") from None
