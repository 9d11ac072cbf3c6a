"""What the policy decides from, kept up to date event by event: no event or decision walks over GPUs or searches."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .policy import (
    NEVER,
    GpuView,
    JobView,
    PolicyConfig,
    Rate,
    Role,
    RoleLoad,
    may_switch,
    quiet_s,
    should_prepare,
    should_switch,
)
from .policy_queue import FairQueue, SearchState

SETTLES = 4


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
    """

    assignments: tuple[Assignment, ...]
    expired: tuple[JobView, ...]
    wake_at: float | None


class Cancelled(NamedTuple):
    """queued: job ids that are out of the queues.  running: GPU indices whose job the pool must kill and release."""

    queued: tuple[str, ...]
    running: tuple[int, ...]


@dataclass(slots=True)
class _Gpu:
    role: Role
    switched: float = NEVER
    job: JobView | None = None
    idle: bool = True
    started: float = 0.0


class PoolState:
    """Queues, estimates, GPUs and searches of one pool, and what to do next with them.

    Events: add_gpu, remove_gpu, add_search, submit, release, cancel, cancel_search; then decide. Every call raises ValueError
    naming what it got when a GPU, job or search is unknown or known already; the state is then unchanged.
    """

    def __init__(self, config: PolicyConfig | None = None, *, role_change: bool = True) -> None:
        self.config = config or PolicyConfig()
        self.role_change = role_change
        self.searches: dict[str, SearchState] = {}
        self.queues = {role: FairQueue(self.searches, self.config) for role in Role}
        self._gpus: dict[int, _Gpu] = {}
        self._idle: dict[Role, dict[int, None]] = {role: {} for role in Role}
        self._counts = dict.fromkeys(Role, 0)
        self._rates = dict.fromkeys(Role, Rate())
        self._service = dict.fromkeys(Role, 0.0)
        self._measured: dict[tuple[str, Role], float] = {}
        self._running: dict[str, int] = {}
        self._deadlines: list[tuple[float, str, Role]] = []
        self._floor = 0.0

    def add_gpu(self, index: int, role: Role) -> None:
        if index in self._gpus:
            raise ValueError(f"gpu={index}: it is in the pool already")
        self._gpus[index] = _Gpu(role)
        self._counts[role] += 1
        self._idle[role][index] = None

    def remove_gpu(self, index: int) -> JobView | None:
        """A GPU left or was lost; returns the job that ran on it, no longer known here, to be retried or reported."""
        gpu = self._gpu(index)
        del self._gpus[index]
        self._counts[gpu.role] -= 1
        self._idle[gpu.role].pop(index, None)
        if gpu.job is not None:
            del self._running[gpu.job.id]
            self.searches[gpu.job.search].running -= 1
        return gpu.job

    def add_search(self, search: str, weight: float = 1.0) -> None:
        if search in self.searches:
            raise ValueError(f"search={search!r}: it is in the pool already")
        if not weight > 0:
            raise ValueError(f"weight={weight!r}: use a number above 0")
        self.searches[search] = SearchState(weight=weight, attained_s=self._floor * weight)

    def submit(self, job: JobView, now: float) -> None:
        state = self.searches.get(job.search)
        if state is None:
            raise ValueError(f"search={job.search!r}: the pool does not know it; add it first")
        if job.id in self._running or any(job.id in queue.jobs for queue in self.queues.values()):
            raise ValueError(f"job={job.id!r}: it is in the pool already")
        if job.deadline is not None and job.deadline <= now:
            raise ValueError(f"deadline={job.deadline}: it has passed")
        if not state.waiting and not state.running:
            state.attained_s = max(state.attained_s, (self._floor - self.config.credit_s) * state.weight)
        state.newest_fork = max(state.newest_fork, job.fork)
        state.waiting += 1
        self._rates[job.role] = self._rates[job.role].seen(now, self.config.rate_tau_s)
        if not self._service[job.role]:
            self._service[job.role] = job.expected_s
        if job.deadline is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.id, job.role))
        self.queues[job.role].push(job)

    def expected_s(self, search: str, role: Role, default: float) -> float:
        """Estimate for the search's next job: its own history, else the role's, else default."""
        return self._measured.get((search, role)) or self._service[role] or default

    def release(self, index: int, now: float, busy_s: float, *, finished: bool = True) -> JobView | None:
        """A GPU is done, with its job (returned), or with a switch without one. busy_s: GPU-seconds that the job took.

        finished: False for a killed job, whose seconds are charged but say nothing about service times.
        """
        gpu = self._gpu(index)
        if gpu.idle:
            raise ValueError(f"gpu={index}: it has nothing to be released from")
        gpu.idle = True
        self._idle[gpu.role][index] = None
        job, gpu.job = gpu.job, None
        if job is None:
            return None
        del self._running[job.id]
        state = self.searches[job.search]
        state.running -= 1
        state.attained_s += busy_s - job.expected_s
        if finished:
            self._learn(job, busy_s)
        for queue in self.queues.values():
            queue.refresh(job.search)
        return job

    def cancel(self, job_id: str) -> Cancelled:
        """Unknown ids cancel nothing: the job may just have finished."""
        for queue in self.queues.values():
            job = queue.remove(job_id)
            if job is not None:
                self.searches[job.search].waiting -= 1
                return Cancelled((job_id,), ())
        return Cancelled((), (self._running[job_id],) if job_id in self._running else ())

    def cancel_search(self, search: str) -> Cancelled:
        """Queued jobs of the search leave now; its running ones are named, the pool kills and releases them."""
        if search not in self.searches:
            raise ValueError(f"search={search!r}: the pool does not know it")
        queued = [job.id for queue in self.queues.values() for job in queue.of_search(search)]
        for job_id in queued:
            self.cancel(job_id)
        running = [index for index in self._running.values() if self._job(index).search == search]
        return Cancelled(tuple(queued), tuple(running))

    def end_search(self, search: str) -> None:
        """Forget a search that has no jobs left."""
        state = self.searches.get(search)
        if state is None or state.waiting or state.running:
            raise ValueError(f"search={search!r}: {'unknown' if state is None else 'it still has jobs; cancel them first'}")
        del self.searches[search]
        for role in Role:
            self._measured.pop((search, role), None)

    def load(self, role: Role, now: float) -> RoleLoad:
        queue = self.queues[role]
        return RoleLoad(
            len(queue),
            queue.waiting_s,
            self._counts[role],
            len(self._idle[role]),
            self._rates[role].at_time(now, self.config.rate_tau_s),
            self._service[role],
            queue.oldest,
        )

    def decide(self, now: float) -> Decision:
        """Give jobs to idle GPUs; afterwards no idle GPU could take a waiting job without breaking the switching rules."""
        expired = tuple(self._expire(now))
        assignments: list[Assignment] = []
        wake_at: float | None = None
        for role in self._order():
            while self._idle[role] and len(self.queues[role]):
                assignments.append(self._serve(role, now))
        if self.role_change:
            for role in Role:
                wake_at = self._lend(role, now, assignments, wake_at)
        return Decision(tuple(assignments), expired, wake_at)

    def gpu_roles(self) -> dict[int, Role]:
        return {index: gpu.role for index, gpu in self._gpus.items()}

    def _order(self) -> Iterable[Role]:
        return Role.PROFILE, Role.VALIDATE

    def _serve(self, role: Role, now: float) -> Assignment:
        """One idle GPU of a role that has work: usually the next job, or a switch to the other role."""
        index = next(reversed(self._idle[role]))
        if self.role_change and len(self.queues[role.other]) and not self._idle[role.other]:
            gpu = self._gpus[index]
            view = GpuView(index, role, gpu.switched)
            if should_switch(view, self.load(role, now), self.load(role.other, now), now, self.config):
                return self._start(index, role.other, now)
        return self._start(index, role, now)

    def _lend(self, role: Role, now: float, out: list[Assignment], wake_at: float | None) -> float | None:
        """Idle GPUs of a role without work: to where work waits, or ready for what will come."""
        other = role.other
        if len(self.queues[role]):
            return wake_at
        for index in list(self._idle[role])[:SETTLES] if not len(self.queues[other]) else list(self._idle[role]):
            gpu = self._gpus[index]
            view = GpuView(index, role, gpu.switched)
            own, theirs = self.load(role, now), self.load(other, now)
            if theirs.waiting and not may_switch(view, now, self.config):
                ready = gpu.switched + self.config.dwell_s
                wake_at = ready if wake_at is None else min(wake_at, ready)
            elif should_switch(view, own, theirs, now, self.config):
                out.append(self._start(index, other, now))
            elif should_prepare(view, own, theirs, now, self.config):
                out.append(self._switch_only(index, other, now))
            elif not theirs.waiting:
                break
        return wake_at

    def _start(self, index: int, role: Role, now: float) -> Assignment:
        job = self.queues[role].pop()
        assert job is not None
        gpu, state = self._gpus[index], self.searches[job.search]
        switch = self._occupy(index, role, now)
        gpu.job, gpu.started = job, now
        self._running[job.id] = index
        state.waiting -= 1
        state.running += 1
        self._floor = max(self._floor, state.attained_s / state.weight)
        state.attained_s += job.expected_s
        for queue in self.queues.values():
            queue.refresh(job.search)
        return Assignment(index, role, job, switch, quiet_s(role, job.expected_s, self.config))

    def _switch_only(self, index: int, role: Role, now: float) -> Assignment:
        self._occupy(index, role, now)
        return Assignment(index, role, None, True, 0.0)

    def _occupy(self, index: int, role: Role, now: float) -> bool:
        gpu = self._gpus[index]
        del self._idle[gpu.role][index]
        gpu.idle = False
        if gpu.role is role:
            return False
        self._counts[gpu.role] -= 1
        self._counts[role] += 1
        gpu.role, gpu.switched = role, now
        return True

    def _learn(self, job: JobView, busy_s: float) -> None:
        weight = self.config.service_weight
        self._service[job.role] += weight * (busy_s - self._service[job.role])
        own = self._measured.get((job.search, job.role), busy_s)
        self._measured[job.search, job.role] = own + 0.5 * (busy_s - own)

    def _expire(self, now: float) -> Iterable[JobView]:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, job_id, role = heapq.heappop(self._deadlines)
            job = self.queues[role].remove(job_id)
            if job is not None:
                self.searches[job.search].waiting -= 1
                yield job

    def _gpu(self, index: int) -> _Gpu:
        if index not in self._gpus:
            raise ValueError(f"gpu={index}: it is not in the pool (it has {sorted(self._gpus)[:16]})")
        return self._gpus[index]

    def _job(self, index: int) -> JobView:
        job = self._gpus[index].job
        assert job is not None
        return job
