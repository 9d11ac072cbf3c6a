"""Termination: when a search has a kernel good enough to end the reasoning.

A criterion is a pure function of the verdicts so far and of what the search has used. Only a correct candidate can be
accepted, whatever the criterion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from specgen_engine.evaluation.base import Status

DEFAULT = "gain:0.3"
PLATEAU_GAIN = 1.05
MAX_SPEEDUP = 100_000.0
MAX_VERDICTS = 10_000
MAX_BUDGET = 1e12
# What a search is thought to gain before its own verdicts say more: half again the speed in 4,000 reasoning tokens.
PRIOR_LOG_GAIN, PRIOR_TOKENS = math.log(1.5), 4_000.0


@dataclass(frozen=True, slots=True)
class Scored:
    """One verdict as the criterion sees it.

    order counts verdicts of the search in the order they came; at_token: reasoning tokens where its kernel was forked;
    roofline: achieved share of the device's roofline, 0 to 1, None where it is not known.
    """

    hash: str
    status: Status
    speedup: float | None
    source: Literal["fork", "base", "draft"]
    order: int
    at_token: int = 0
    roofline: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What a search has used so far. tokens: reasoning and forks; evaluator_s: compiling, checking, timing."""

    seconds: float = 0.0
    reasoning_tokens: int = 0
    tokens: int = 0
    evaluator_s: float = 0.0


START = Progress()


@dataclass(frozen=True, slots=True)
class Decision:
    """Accept the candidate with this hash; reason is one line for people."""

    hash: str
    reason: str


class Criterion(Protocol):
    """Says of the verdicts so far whether the reasoning ends, and with which candidate."""

    @property
    def spec(self) -> str: ...

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None: ...


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

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
        return None


@dataclass(frozen=True, slots=True)
class FirstCorrect:
    """Spec ``correct``: the first correct candidate, fast or slow."""

    spec: str = "correct"

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
        first = next((one for one in _verdicts(scored) if _usable(one)), None)
        return None if first is None else Decision(first.hash, f"first correct candidate, {first.speedup:.3g}x")


@dataclass(frozen=True, slots=True)
class Speedup:
    """Spec ``speedup:X``: a correct candidate at least X times as fast as the reference."""

    target: float

    @property
    def spec(self) -> str:
        return f"speedup:{self.target:g}"

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
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

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
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

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
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


@dataclass(frozen=True, slots=True)
class Roofline:
    """Spec ``roofline:X``: a correct candidate that reaches at least the share X of its device's roofline."""

    share: float

    @property
    def spec(self) -> str:
        return f"roofline:{self.share:g}"

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
        top = best(one for one in scored if one.roofline is not None and one.roofline >= self.share)
        if top is None or top.roofline is None:
            return None
        return Decision(top.hash, f"{top.roofline:.0%} of the roofline reaches {self.share:.0%}, {top.speedup:.3g}x")


@dataclass(frozen=True, slots=True)
class Gain:
    """Spec ``gain:R``: going on is expected to pay less than R times what it costs.

    Pay: expected log speed-up a reasoning token, from the steps of at least 5 % seen since the first correct kernel
    and a prior. Cost: the log of the search's tokens grows by 1 / tokens a token. R = 1: one per cent more tokens
    should bring one per cent of speed; nothing is decided before a candidate beats the reference.
    """

    ratio: float

    @property
    def spec(self) -> str:
        return f"gain:{self.ratio:g}"

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
        top = best(scored)
        if top is None or top.speedup is None or top.speedup <= 1.0:
            return None
        pay = expected_log_gain(scored, progress.reasoning_tokens) * progress.reasoning_tokens
        if pay >= self.ratio:
            return None
        return Decision(
            top.hash, f"going on would pay {pay:.2g} of its cost, asked is {self.ratio:g}; {top.speedup:.3g}x"
        )


def expected_log_gain(scored: Sequence[Scored], reasoning_tokens: int) -> float:
    """Expected log of the speed-up that one more reasoning token brings, from the steps so far and the prior."""
    gained, mark, first = PRIOR_LOG_GAIN, 0.0, None
    for one in _verdicts(scored):
        if not _usable(one) or one.speedup is None:
            continue
        first = one.at_token if first is None else first
        if mark and one.speedup >= mark * PLATEAU_GAIN:
            gained += math.log(one.speedup / mark)
        if not mark or one.speedup >= mark * PLATEAU_GAIN:
            mark = one.speedup
    return gained / (max(reasoning_tokens - (first or 0), 0) + PRIOR_TOKENS)


@dataclass(frozen=True, slots=True)
class Budget:
    """Spec ``budget:seconds=S,tokens=T,gpu_seconds=G``: the best correct candidate once any of them is used up."""

    seconds: float | None = None
    tokens: float | None = None
    gpu_seconds: float | None = None

    @property
    def spec(self) -> str:
        named = (("seconds", self.seconds), ("tokens", self.tokens), ("gpu_seconds", self.gpu_seconds))
        return "budget:" + ",".join(f"{name}={value:.12g}" for name, value in named if value is not None)

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
        top = best(scored)
        used = (
            ("seconds", self.seconds, progress.seconds),
            ("tokens", self.tokens, progress.tokens),
            ("gpu_seconds", self.gpu_seconds, progress.evaluator_s),
        )
        over = next((name for name, limit, value in used if limit is not None and value >= limit), None)
        if over is None or top is None:
            return None
        return Decision(top.hash, f"the budget of {over} is used up, best {top.speedup:.3g}x")


@dataclass(frozen=True, slots=True)
class FirstOf:
    """Criteria joined by ``|``: the first that decides, in the order of the spec."""

    members: tuple[Criterion, ...]

    @property
    def spec(self) -> str:
        return "|".join(member.spec for member in self.members)

    def decide(self, scored: Sequence[Scored], progress: Progress = START) -> Decision | None:
        return next((made for member in self.members if (made := member.decide(scored, progress))), None)


def watches_progress(criterion: Criterion) -> bool:
    """Whether it can decide without a new verdict, because time or tokens have passed."""
    if isinstance(criterion, FirstOf):
        return any(watches_progress(member) for member in criterion.members)
    return isinstance(criterion, (Budget, Gain))


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
    if name == "roofline":
        return Roofline(_number(argument, 0.01, 1.0, "roofline:0.8", whole=False))
    if name == "gain":
        return Gain(_number(argument, 0.001, 1_000.0, "gain:0.5", whole=False))
    if name == "budget":
        return _budget(argument)
    raise ValueError(
        "no such criterion; use correct, speedup:1.5, best_of:4, plateau:3, roofline:0.8, gain:0.5, "
        "budget:tokens=20000, several joined by |, or none"
    )


def _budget(argument: str) -> Budget:
    limits: dict[str, float] = {}
    for part in argument.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in ("seconds", "tokens", "gpu_seconds") or name in limits:
            raise ValueError("it names seconds, tokens or gpu_seconds once each, as in budget:seconds=600,tokens=20000")
        limits[name] = _number(value, 1, MAX_BUDGET, "budget:tokens=20000", whole=False)
    return Budget(**limits)


def parse_termination(spec: str, field: str = "termination") -> Criterion:
    """Criterion of a spec: ``correct``, ``speedup:1.5``, ``best_of:4``, ``plateau:3``, ``roofline:0.8``,
    ``gain:0.3`` (the default), ``budget:seconds=600``, several joined by ``|``, or ``none``.

    Raises ValueError with the field, the value and the remedy.
    """
    try:
        parts = [part.strip() for part in spec.split("|")] if isinstance(spec, str) else [""]
        if len(parts) > 1 and "none" in parts:
            raise ValueError("none can't be joined with other criteria; use it alone")
        members = tuple(_criterion(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{field}={spec!r}: {error}") from None
    return members[0] if len(members) == 1 else FirstOf(members)
