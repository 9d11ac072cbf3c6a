"""The contract of evaluation: a task and a candidate go in, one verdict comes out.

No torch here: the controller, the replay and the simulator import this module.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Status(StrEnum):
    """The closed set of outcomes (DESIGN.md, Reports)."""

    CORRECT = "correct"
    WRONG = "wrong"
    COMPILE_ERROR = "compile_error"
    RUNTIME_ERROR = "runtime_error"
    TIMEOUT = "timeout"
    CRASH = "crash"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


class Stage(StrEnum):
    """What a job is doing; a verdict carries the seconds of each stage it went through."""

    QUEUED = "queued"
    COMPILE = "compile"
    CHECK = "check"
    TIME = "time"
    PROFILE = "profile"


MAX_CASES = 64
_CASES = re.compile(r"^CASES = (\d{1,4})$", re.MULTILINE)


def source_hash(source: str) -> str:
    """First 16 hex digits of SHA-256 over the source with trailing blanks and blank edges removed."""
    normal = "\n".join(line.rstrip() for line in source.strip().splitlines())
    return hashlib.sha256(normal.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Task:
    """A reference module in KernelBench form: Model, get_inputs() -> list, get_init_inputs() -> list.

    A module with a line `CASES = N` has N shapes: get_inputs(case) makes those of one, 0 is the one that is timed.
    files: what the reference may read besides installed software; absolute paths, never taken from a request.
    """

    source: str
    name: str = "task"
    files: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        return source_hash(self.source)

    @property
    def cases(self) -> int:
        """Shapes of its inputs, 1 to MAX_CASES."""
        found = _CASES.search(self.source)
        return max(1, min(MAX_CASES, int(found[1]))) if found else 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete module that defines ModelNew, or another form that evaluation/candidates knows."""

    source: str

    @property
    def hash(self) -> str:
        return source_hash(self.source)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a candidate once it has run, or why it did not.

    speedup: reference time / candidate time, both medians of the same run; only with CORRECT.
    interval: (low, high) 95 % confidence interval of speedup.
    reason: one line for people; digest: the lines of an error that a language model can use.
    stages: seconds by Stage value; waiting for the GPU counts as queued.
    roofline: the least time of the task's bytes at the device's peak bandwidth / candidate_ms; None: no peak is known.
    profile: evaluation/profile/base.Profile as a dict, "text" with 15 lines for a prompt; None: none was asked for.
    own_s: the share of those seconds that was the candidate's own: import with compiling, construction, calls.
    form: what the candidate was taken for (evaluation/candidates); "" when nothing looked at its text.
    kind: of a wrong result: structure, shape, dtype, nan or value.
    overhead: seconds of the harness's own work by step; "other" is what no step claims.
    extra_ms: on a GPU, medians beside candidate_ms: candidate_warm and reference_warm (inputs left in the L2 cache),
        candidate_graph (replays of the call as a CUDA graph) where it can be captured.
    conditions: of the GPU while it was timed: use (turn: other evaluations were kept off it; turn, quiet: KV copies
        too), clocks, temperature, power, throttling, each [before, after]; host_behind: of reference and candidate,
        the share of calls that the GPU began before all of it was launched; cpu_wait: of the time in which either's
        process had no CPU. On either device warning: where the speed-up is not known within 10 %, how well and why;
        rounds_left_out: so many, in which alone the host came late; rounds_ms: the medians of
        [reference, candidate] in each round; asked_again: the suspicion for which timing was made once more; engine:
        ran, when one that serves on the device did not stand still. Of any verdict made_again: how the first try's
        process was killed, by none of the evaluation's, or how its GPU had no memory; this is the second.
    max_abs_error, max_rel_error: largest over the elements compared last, where both are floating point.
    """

    candidate: str
    status: Status
    reason: str = ""
    digest: str = ""
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    candidate_ms: float | None = None
    reference_ms: float | None = None
    device: str = "cpu"
    sandbox: str = "process"
    stages: dict[str, float] = field(default_factory=dict)
    own_s: float = 0.0
    roofline: float | None = None
    profile: dict[str, Any] | None = None
    form: str = ""
    kind: str = ""
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    overhead: dict[str, float] = field(default_factory=dict)
    extra_ms: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.status is Status.CORRECT) != (self.speedup is not None):
            raise ValueError(f"verdict {self.candidate}: speedup={self.speedup} does not go with status {self.status}")


class Job(Protocol):
    """A submitted evaluation. events() ends after the last stage; verdict() never raises for candidate faults."""

    @property
    def id(self) -> str: ...
    def events(self) -> AsyncIterator[Stage]: ...
    async def verdict(self) -> Verdict: ...
    def cancel(self) -> None: ...


class Pool(Protocol):
    """Where candidates are evaluated; local or, later, on other hosts."""

    async def start(self) -> None: ...
    async def check_task(self, task: Task) -> str | None:
        """Runs the reference in a worker; None when usable, else one line saying what is wrong with it."""
        ...

    def submit(
        self,
        task: Task,
        candidate: Candidate,
        *,
        search: str,
        priority: float = 0.0,
        deadline: float | None = None,
        fork: int = 0,
        stage: str = "evaluate",
        options: Mapping[str, object] | None = None,
    ) -> Job:
        """Queue one evaluation. deadline is a time.monotonic() value; raises ValueError when it has passed.

        fork: the fork's number in its search; the newest goes first. stage: evaluate, or profile for a candidate that
        is known to be correct. options: more of the worker's request, such as profile, the tool.
        """
        ...

    def cancel_search(self, search: str) -> int:
        """Cancel queued and running jobs of a search; returns how many."""
        ...

    def snapshot(self) -> dict[str, object]: ...
    async def close(self) -> None: ...
