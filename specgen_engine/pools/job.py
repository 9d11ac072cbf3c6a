"""A submitted job: its handle for whoever waits, and its form in the journal."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from ..evaluation.base import Candidate, Stage, Status, Task, Verdict
from .base import STAGES, JobStage
from .policy import JobView, Role

if TYPE_CHECKING:
    from .dispatch import Dispatcher


class Order(NamedTuple):
    """What was submitted; all that is needed to run it again after a crash.

    deadline: seconds since the epoch, since another process's monotonic clock says nothing here.
    """

    stage: JobStage
    task: Task
    candidate: Candidate | None
    search: str
    priority: float = 0.0
    deadline: float | None = None
    fork: int = 0
    could_end: bool = False
    options: Mapping[str, object] | None = None

    def to_json(self) -> str:
        own = self._asdict() | {
            "options": dict(self.options) if self.options else None,
            "task": asdict(self.task),
            "candidate": self.candidate.source if self.candidate else None,
        }
        return json.dumps(own)

    @classmethod
    def from_json(cls, text: str) -> Order:
        """Raises ValueError, KeyError or TypeError for a text that to_json did not write."""
        own = json.loads(text)
        source = own.pop("candidate")
        return cls(
            stage=JobStage(own.pop("stage")),
            task=Task(**{name: _frozen(value) for name, value in own.pop("task").items()}),
            candidate=Candidate(source) if source is not None else None,
            **own,
        )


def order_of(
    task: Task,
    candidate: Candidate,
    search: str,
    *,
    stage: JobStage | str,
    priority: float,
    deadline: float | None,
    fork: int,
    could_end: bool | None,
    options: Mapping[str, object] | None,
) -> Order:
    """What a pool's submit() was given. deadline: a time.monotonic() value.

    could_end: default: when its priority is above 0, and of what comes after the verdict.
    Raises ValueError for a deadline that has passed or a stage that is not known.
    """
    if deadline is not None and deadline <= time.monotonic():
        raise ValueError(f"deadline={deadline}: it has passed; give a later time.monotonic() value or none")
    try:
        stage = JobStage(stage)
    except ValueError:
        raise ValueError(f"stage={stage!r}: use one of {', '.join(JobStage)}") from None
    if could_end is None:
        could_end = priority > 0 or STAGES[stage].role is Role.PROFILE
    wall = None if deadline is None else time.time() + deadline - time.monotonic()
    return Order(stage, task, candidate, search, priority, wall, fork, could_end, options)


@dataclass(eq=False, kw_only=True)
class JobHandle:
    """What whoever submitted a job holds of it; see evaluation.base.Job."""

    id: str
    order: Order
    seen: list[Stage] = field(default_factory=list)
    result: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    changed: anyio.Event = field(default_factory=anyio.Event)

    async def events(self) -> AsyncIterator[Stage]:
        """Stages as they are reached, from the first on; ends with the job."""
        index = 0
        while True:
            while index < len(self.seen):
                yield self.seen[index]
                index += 1
            if self.result.done():
                return
            await self.changed.wait()

    async def verdict(self) -> Verdict:
        """Of an evaluation; never raises for what the candidate did."""
        return await asyncio.shield(self.result)

    async def outcome(self) -> Any:
        """Verdict, or for other stages the worker's answer; a job that failed has a Verdict that says how."""
        return await asyncio.shield(self.result)

    def advance(self, stage: Stage) -> None:
        if not self.result.done():
            self.seen.append(stage)
            self._wake()

    def finish(self, value: Any) -> None:
        if not self.result.done():
            self.result.set_result(value)
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


@dataclass(eq=False, kw_only=True)
class PoolJob(JobHandle):
    """A job in the process that drives the pool. tries: attempts that died under it.

    build_began: while a builder has it.  built_s: what that took.
    """

    pool: Dispatcher
    view: JobView
    submitted: float
    seen: list[Stage] = field(default_factory=lambda: [Stage.QUEUED])
    slot: int | None = None
    attempt: int = 0
    tries: int = 0
    cancelled: str = ""  # why, once somebody has asked for it
    queued_s: float = 0.0
    began: float = 0.0
    busy_since: float | None = None
    build_began: float | None = None
    built_s: float = 0.0

    def cancel(self) -> None:
        """Queued: it ends now. Running: its processes are killed, the verdict follows within 200 ms."""
        self.pool.cancel(self)

    def failed(self, status: Status, reason: str, device: str) -> Verdict:
        candidate = self.order.candidate.hash if self.order.candidate else ""
        return Verdict(candidate, status, reason, device=device, stages=self.waited())

    def waited(self) -> dict[str, float]:
        queued_s = self.queued_s or time.monotonic() - self.submitted - self.built_s
        stages: dict[str, float] = {Stage.QUEUED: round(queued_s, 4)}
        if self.built_s:
            stages[Stage.COMPILE] = round(self.built_s, 4)
        return stages


def _frozen(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def outcome_text(value: Any) -> str:
    """How the journal keeps an outcome: JSON with at least a status."""
    if isinstance(value, Verdict):
        return json.dumps(asdict(value))
    return json.dumps({"status": "done", "value": value})


def outcome_value(text: str) -> Any:
    """What outcome_text kept."""
    told = json.loads(text)
    if told["status"] == "done":
        return told["value"]
    interval = told.pop("interval")
    return Verdict(
        status=Status(told.pop("status")),
        interval=tuple(interval) if interval else None,
        **told,
    )
