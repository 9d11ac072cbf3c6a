"""What the policy says, and a whole pool at one moment as plan() takes it."""

from __future__ import annotations

from typing import NamedTuple

from .policy import GpuView, JobView, Role


class Assignment(NamedTuple):
    """What a GPU does next. switch: it changes to role first.  job: None when it only changes roles.

    quiet_s: for how long KV copies must leave its memory alone, from the job's start; 0 for none.
    """

    gpu: int
    role: Role
    job: JobView | None
    switch: bool
    quiet_s: float


class Decision(NamedTuple):
    """assignments: to carry out now.  expired: jobs whose deadline passed while they waited, to be reported.

    wake_at: decide again then, though nothing else happens; None when only an event can change the decision.
    builds: jobs that a builder takes now; PoolState.built follows.
    """

    assignments: tuple[Assignment, ...]
    expired: tuple[JobView, ...]
    wake_at: float | None
    builds: tuple[JobView, ...] = ()


class Cancelled(NamedTuple):
    """queued: job ids that are out of the queues.  running: GPU indices whose job the pool must kill and release.

    Of a queued one that a builder has, the pool kills the build; PoolState.built follows.
    """

    queued: tuple[str, ...]
    running: tuple[int, ...]


class Snapshot(NamedTuple):
    """A whole pool at one moment. gpus: the idle ones.  busy: GPUs at work, by role.

    searches: (name, weight, attained_s) each.
    arrival_per_s, service_s: estimates by role.
    """

    now: float
    gpus: tuple[GpuView, ...]
    busy: dict[Role, int]
    jobs: tuple[JobView, ...]
    searches: tuple[tuple[str, float, float], ...]
    arrival_per_s: dict[Role, float]
    service_s: dict[Role, float]
