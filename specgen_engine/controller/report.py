"""What is known of a search: the record behind sglext.specgen, GET /specgen/searches and `specgen replay`."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from specgen_engine.evaluation.base import Status


@dataclass(slots=True)
class ForkRecord:
    """at_token: reasoning tokens before the fork. prefix_reused: cached tokens of its input. Seconds from the start.

    replica: the data-parallel one that it ran on, None without any. candidate: that it wrote, or, of one that was ended
    as a repeat, that of the fork it follows.
    """

    n: int
    trigger: str
    at_token: int
    prompt_tokens: int
    input_tokens: int
    started_s: float
    prefix_inserted: int = 0
    prefix_reused: int = 0
    prefix_computed: int = 0
    page_size: int = 1
    replica: int | None = None
    tokens: int = 0
    finished_s: float | None = None
    candidate: str | None = None
    state: str = "running"


@dataclass(slots=True)
class CandidateRecord:
    """One distinct candidate. source: fork | base | draft. forks: numbers of the forks that wrote it.

    at_token: reasoning tokens where it was forked or drafted; order: of its verdict among the search's.
    """

    hash: str
    source: Literal["fork", "base", "draft"]
    submitted_s: float
    forks: list[int] = field(default_factory=list)
    recorded_answer: str | None = None
    status: Status | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    candidate_ms: float | None = None
    reference_ms: float | None = None
    reason: str = ""
    digest: str = ""
    device: str = ""
    sandbox: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    verdict_s: float | None = None
    at_token: int = 0
    order: int | None = None
    roofline: float | None = None
    profile: str = ""
    profile_s: float | None = None


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One question to the criterion, with all that it was told: the first ``verdicts`` verdicts and what was used."""

    t_s: float
    verdicts: int
    reasoning_tokens: int
    tokens: int
    evaluator_s: float
    accepted: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LateFork:
    """A fork that was not made because its feedback would have come too late. left_s, feedback_s: expected, from t_s.

    reason: one line of the pool's.
    """

    t_s: float
    at_token: int
    trigger: str
    left_s: float
    feedback_s: float | None
    reason: str


@dataclass(slots=True)
class TokenIds:
    """Ids of a search's base output and of each fork's input and output, 4 bytes each; for audits of reused KV."""

    base: array[int] = field(default_factory=lambda: array("i"))
    fork_inputs: list[array[int]] = field(default_factory=list)
    fork_outputs: dict[int, array[int]] = field(default_factory=dict)

    def add_fork(self, ids: Iterable[int]) -> None:
        self.fork_inputs.append(array("i", ids))

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": list(self.base),
            "forks": [
                {"n": n, "input_ids": list(ids), "output_ids": list(self.fork_outputs.get(n, ()))}
                for n, ids in enumerate(self.fork_inputs, 1)
            ],
        }


@dataclass(slots=True)
class SearchRecord:
    """One search from its first token to its answer. ended_by: criterion | reasoning | budget | cancelled | error.

    profiling: candidates whose profile is still to come; the accepted one's may come after the search's end.
    """

    id: str
    task: str
    task_hash: str
    trigger: str
    termination: str
    created: float
    named: bool = False
    trace: str | None = None
    iteration: int | None = None
    state: str = "preparing"
    replica: int | None = None
    prompt_tokens: int = 0
    reasoning_tokens: int = 0
    recorded_reasoning_tokens: int | None = None
    answer_tokens: int = 0
    forks_skipped: int = 0
    ended_by: str | None = None
    reason: str = ""
    reasoning_s: float | None = None
    wall_s: float | None = None
    evaluation_s: float = 0.0
    profiling: int = 0
    accepted: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    final: dict[str, Any] | None = None
    warning: str = ""
    forks: list[ForkRecord] = field(default_factory=list)
    candidates: list[CandidateRecord] = field(default_factory=list)
    decisions: list[DecisionRecord] = field(default_factory=list)
    late_forks: list[LateFork] = field(default_factory=list)
    ids: TokenIds = field(default_factory=TokenIds, repr=False)

    @property
    def fork_tokens(self) -> int:
        """What the forks have generated; one that was told to stop may still add the step it was in."""
        return sum(fork.tokens for fork in self.forks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without token ids; tokens and seconds by kind beside the flat fields."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ids"}
        data["fork_tokens"] = self.fork_tokens
        data["forks"] = [asdict(fork) for fork in self.forks]
        data["candidates"] = [asdict(candidate) for candidate in self.candidates]
        data["decisions"] = [asdict(decision) for decision in self.decisions]
        data["late_forks"] = [asdict(late) for late in self.late_forks]
        data["tokens"] = {"reasoning": self.reasoning_tokens, "answer": self.answer_tokens, "fork": self.fork_tokens}
        data["seconds"] = {"reasoning": self.reasoning_s, "total": self.wall_s, "evaluation": self.evaluation_s}
        return data


def summary_of(candidate: CandidateRecord | None) -> dict[str, Any] | None:
    """{hash, source, speedup} as reports name a chosen candidate (DESIGN.md, Reports)."""
    if candidate is None:
        return None
    return {"hash": candidate.hash, "source": candidate.source, "speedup": candidate.speedup}
