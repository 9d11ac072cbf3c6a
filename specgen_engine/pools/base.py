"""What a pool is made of: the stages of a job, the work that an evaluator is given, what it says, and its backend.

A slot is one worker process bound to a device. A GPU has one, or several that compile side by side and take turns on
it. Slots are numbered by the backend, a number is used once: a worker that comes back is a new slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from ..evaluation.base import Candidate, Stage, Status, Task, Verdict
from .policy import Role


class JobStage(StrEnum):
    """What a job asks of a candidate. evaluate: compile, check and time, for the verdict.

    time: the same again, alone on its GPU under a quiet lease, to confirm a speed-up.  profile: what bounds it.
    check_task: run the reference; the candidate is None.
    """

    EVALUATE = "evaluate"
    TIME = "time"
    PROFILE = "profile"
    CHECK_TASK = "check_task"


class StageSpec(NamedTuple):
    """role: which evaluators take it.  op: what the worker's protocol calls it."""

    role: Role
    op: str


STAGES = {
    JobStage.EVALUATE: StageSpec(Role.VALIDATE, "evaluate"),
    JobStage.TIME: StageSpec(Role.PROFILE, "evaluate"),
    JobStage.PROFILE: StageSpec(Role.PROFILE, "profile"),
    JobStage.CHECK_TASK: StageSpec(Role.VALIDATE, "check_task"),
}
BUSY_STAGES = frozenset({"check", "time", "profile"})
"""Of a verdict's stages: those that work on the GPU. Compiling and waiting are idle."""


class Work(NamedTuple):
    """One attempt at a job, as a slot gets it.

    quiet_s: how long KV copies may be kept off the device once it is timed or profiled; 0: the backend's own bound.
    options: more of the worker's request, as its op defines it.
    """

    job: str
    attempt: int
    op: str
    task: Task
    candidate: Candidate | None
    quiet_s: float = 0.0
    options: Mapping[str, object] | None = None

    def message(self) -> dict[str, object]:
        """What the worker reads."""
        head: dict[str, object] = {**(self.options or {}), "op": self.op, "job": self.job, "task": asdict(self.task)}
        return head if self.candidate is None else head | {"candidate": self.candidate.source}


class SlotUp(NamedTuple):
    """A worker is ready. unit: the GPU (or CPU worker) that its time is accounted to, unique in the pool."""

    slot: int
    unit: str
    device: str
    sandbox: str


class SlotDown(NamedTuple):
    """A worker is gone, with whatever it ran."""

    slot: int
    why: str


class Reached(NamedTuple):
    slot: int
    job: str
    attempt: int
    stage: Stage


class Done(NamedTuple):
    """message: the worker's last one about the job, with `verdict`, `task` or the op's own key."""

    slot: int
    job: str
    attempt: int
    message: dict[str, Any]


class Switched(NamedTuple):
    """The slot has taken up its new role."""

    slot: int


class NoSlot(NamedTuple):
    """No worker can start; what waits would wait for ever."""

    why: str


class Built(NamedTuple):
    """A builder is done with a job, or with what a cancelled one left.

    message: the worker's last one when the candidate failed, else None.  learnt: whether its seconds tell how long such
    builds take: not where it was cut off, or found built.
    """

    job: str
    message: dict[str, Any] | None
    learnt: bool


class NoBuilder(NamedTuple):
    """No builder can start: slots build."""

    why: str


Event = SlotUp | SlotDown | Reached | Done | Switched | NoSlot | Built | NoBuilder


class Builds(Protocol):
    """What a backend does that builds candidates beside its slots. build_slots: how many at once; 0: it doesn't."""

    build_slots: int

    def build(self, work: Work) -> None:
        """Import the candidate, so that its library is in the cache. A Built follows."""
        ...

    def cancel_build(self, job: str) -> None:
        """Kill what it runs; its Built follows."""
        ...


class Backend(Protocol):
    """Carries work to slots. Everything but close() returns at once; what happens is told as events, in order.

    All of it is used from one event loop. One that is Builds too has builders.
    """

    def open(self, tell: Callable[[Event], None]) -> None:
        """Start slots in the background."""
        ...

    def run(self, slot: int, work: Work) -> None:
        """A Done or a SlotDown follows."""
        ...

    def switch(self, slot: int, role: Role) -> None:
        """A Switched or a SlotDown follows."""
        ...

    def cancel(self, slot: int, job: str) -> None:
        """Kill what the job runs; its Done follows soon."""
        ...

    def kill(self, slot: int) -> None:
        """End a slot that does not answer; a SlotDown follows."""
        ...

    def expect(self, starts_per_s: float) -> None:
        """So many jobs a second begin from now on: memory that they will need and that is lent is asked back."""
        ...

    def describe(self) -> dict[str, object]:
        """device, workers (slots there should be), restarts."""
        ...

    async def close(self) -> None:
        """End every slot and what it started; no events follow."""
        ...


class Lending(Protocol):
    """The KV tier's use of an evaluator's spare memory. All but lends() block; they are called on a thread."""

    def lends(self, device: str) -> bool:
        """Whether others may have some of the device's memory."""
        ...

    def quiet(self, device: str, seconds: float) -> AbstractContextManager[bool]:
        """No KV copy begins on the device's memory inside, for at most so many seconds.

        Gives whether those under way had ended.
        """
        ...

    def make_room(self, device: str, need_bytes: int) -> int:
        """Ask lent memory back until need_bytes are free; returns the bytes that came back."""
        ...

    def make_room_ahead(self, starts_per_s: float, need_bytes: int) -> int:
        """The same before jobs need it, on as many devices as they will start on; returns the bytes that came back."""
        ...


def verdict_of(message: dict[str, Any], waited: dict[str, float]) -> Verdict:
    """The verdict in a worker's message. waited: seconds in the pool's queue, to which those for the GPU are added.

    Of a candidate that a builder built, also its seconds as compile: the slot's own are added to them.
    """
    told = dict(message)
    interval, status = told.pop("interval", None), Status(told.pop("status"))
    stages = waited | told.pop("stages")
    if built_s := waited.get(Stage.COMPILE, 0.0):
        stages[Stage.COMPILE] = round(built_s + message["stages"].get(Stage.COMPILE, 0.0), 4)
        told["own_s"] = round(built_s + told.get("own_s", 0.0), 4)
    stages[Stage.QUEUED] = round(stages[Stage.QUEUED] + told.pop("waited", 0.0), 4)
    return Verdict(status=status, interval=tuple(interval) if interval else None, stages=stages, **told)


def busy_seconds(stages: dict[str, float]) -> float:
    """GPU-seconds of a verdict: what utilisation and fairness count."""
    return sum(seconds for stage, seconds in stages.items() if stage in BUSY_STAGES)
