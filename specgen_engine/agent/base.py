"""What the agent loop keeps: budgets, generations, attempts. Pure data and pure questions about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specgen_engine.errors import SpecGenError
from specgen_engine.evaluation.base import Status


class AgentError(SpecGenError):
    """The run can't start or go on; the message names the field, its value and the remedy."""


@dataclass(frozen=True, slots=True)
class Budget:
    """iterations: of each search. minutes: of wall time while a run is up. tokens: generated ones, forks' included.
    gpu_seconds: of compiling, checking, timing and profiling (on a CPU too). None: no limit."""

    iterations: int = 4
    minutes: float | None = None
    tokens: int | None = None
    gpu_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "minutes", "tokens", "gpu_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = f"--{name.replace('_', '-')}"
                raise AgentError(f"{flag} {value}: must be above zero and finite; leave it out for no limit")


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run has used so far, over all its starts."""

    seconds: float = 0.0
    tokens: int = 0
    gpu_seconds: float = 0.0


def exhausted(budget: Budget, spent: Spent) -> str | None:
    """The first limit that is reached, in words; None while there is something left of each."""
    if budget.minutes is not None and spent.seconds >= budget.minutes * 60:
        return f"{budget.minutes:g} minutes are over"
    if budget.tokens is not None and spent.tokens >= budget.tokens:
        return f"{budget.tokens} tokens are used"
    if budget.gpu_seconds is not None and spent.gpu_seconds >= budget.gpu_seconds:
        return f"{budget.gpu_seconds:g} evaluator seconds are used"
    return None


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer of the endpoint.

    search: what the endpoint reported under sglext.specgen, None without forks. completion_tokens: reasoning and
    answer; fork_tokens beside them. seconds: request to answer.
    """

    answer: str
    reasoned: bool
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    finish: str = "stop"
    search: dict[str, Any] | None = None

    @property
    def fork_tokens(self) -> int:
        return int(self.search["fork_tokens"]) if self.search else 0

    @property
    def tokens(self) -> int:
        return self.completion_tokens + self.fork_tokens


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict as the loop keeps it. stages: seconds by stage; profile: at most 15 lines for a prompt."""

    hash: str
    status: Status
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    candidate_ms: float | None = None
    reference_ms: float | None = None
    reason: str = ""
    digest: str = ""
    device: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    profile: str = ""
    by_endpoint: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """One iteration of one search. judgement is None until its candidate has a verdict; source is None when the
    answer held no module. started_s, generated_s, ended_s: seconds of the run."""

    search: int
    iteration: int
    generation: Generation
    source: str | None
    started_s: float
    generated_s: float
    judgement: Judgement | None = None
    ended_s: float | None = None

    @property
    def done(self) -> bool:
        return self.ended_s is not None

    @property
    def speedup(self) -> float | None:
        """Of a correct candidate, else None."""
        return self.judgement.speedup if self.judgement else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Attempt:
        judged = row["judgement"]
        if judged is not None:
            interval = tuple(judged["interval"]) if judged["interval"] else None
            judged = Judgement(**{**judged, "status": Status(judged["status"]), "interval": interval})
        return cls(**{**row, "generation": Generation(**row["generation"]), "judgement": judged})


def best_of(attempts: Iterable[Attempt]) -> Attempt | None:
    """The fastest correct attempt, the earlier one of two equals; None when none is correct."""
    correct = [one for one in attempts if one.speedup is not None]
    return max(correct, key=lambda one: (one.speedup or 0.0, -one.started_s), default=None)


def last_of(attempts: Sequence[Attempt], search: int) -> Attempt | None:
    """The latest finished attempt of a search."""
    own = [one for one in attempts if one.search == search and one.done]
    return max(own, key=lambda one: one.iteration, default=None)


def failed_of(attempts: Sequence[Attempt], search: int) -> Attempt | None:
    """The latest attempt of a search whose candidate was judged and is not correct."""
    own = [one for one in attempts if one.search == search and one.done and one.judgement and one.speedup is None]
    return max(own, key=lambda one: one.iteration, default=None)


def spent_by(attempts: Iterable[Attempt], seconds: float) -> Spent:
    """Tokens and evaluator seconds of attempts; work of the endpoint's own evaluators counts too."""
    tokens, evaluator_s, judged = 0, 0.0, set[str]()
    for one in attempts:
        tokens += one.generation.tokens
        evaluator_s += float((one.generation.search or {}).get("evaluation_s", 0.0))
        if one.judgement and not one.judgement.by_endpoint and one.judgement.hash not in judged:
            judged.add(one.judgement.hash)
            evaluator_s += sum(s for stage, s in one.judgement.stages.items() if stage != "queued")
    return Spent(seconds, tokens, evaluator_s)
