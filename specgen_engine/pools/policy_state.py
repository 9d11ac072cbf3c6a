"""What the policy decides from, kept up to date event by event: no event or decision walks over GPUs or searches."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from .policy import (
    NEVER,
    Admission,
    JobView,
    PolicyConfig,
    Rate,
    Role,
    RoleLoad,
    admit,
    fairness_binds,
    quiet_s,
    should_prepare,
    should_switch,
    starts_per_s,
)
from .policy_builds import BuildLine
from .policy_decision import Assignment, Cancelled, Decision, Snapshot
from .policy_gpus import GpuSet
from .policy_queue import FairQueue, SearchState

MOST_PLACES = 64
"""Idle GPUs that place() may choose from, so that a decision costs the same in a large pool."""


class PoolState:
    """Queues, estimates, GPUs and searches of one pool, and what to do next with them.

    Events: add_gpu, remove_gpu, add_search, submit, release, cancel, cancel_search; then decide. Every call raises
    ValueError naming what it got when a GPU, job or search is unknown or known already; the state is then unchanged.

    place: which of some idle GPUs of the right role suits a job best, None for no preference.
    build_slots: as BuildLine has them.
    """

    def __init__(
        self,
        config: PolicyConfig | None = None,
        *,
        place: Callable[[JobView, list[int]], int | None] | None = None,
        build_slots: int | None = None,
    ) -> None:
        self.config, self._place = config or PolicyConfig(), place
        self.searches: dict[str, SearchState] = {}
        self.queues = {role: FairQueue(self.searches, self.config) for role in Role}
        self._gpus = GpuSet(self.config.dwell_s)
        self._rates = dict.fromkeys(Role, Rate())
        self._service = dict.fromkeys(Role, 0.0)
        self._measured: dict[tuple[str, Role], float] = {}
        self._running: dict[str, int] = {}
        self._deadlines: list[tuple[float, str, Role]] = []
        self._floor = 0.0
        self.builds = BuildLine(build_slots)
        self._quick = Rate()  # arrivals of jobs without a build

    def add_gpu(self, index: int, role: Role, switched: float = NEVER, *, idle: bool = True) -> None:
        """idle: False for one that still starts, or works on a job of an earlier life; release it when it is ready."""
        self._gpus.add(index, role, switched, idle=idle)

    def remove_gpu(self, index: int) -> JobView | None:
        """A GPU left or was lost; returns the job that ran on it, no longer known here, to be retried or reported."""
        gpu = self._gpus.remove(index)
        if gpu.job is not None:
            self.builds.leave(gpu.job.id)
            del self._running[gpu.job.id]
            state = self.searches[gpu.job.search]
            state.running -= 1
            state.attained_s -= gpu.job.expected_s
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
        if job.id in self._running or self._queued(job.id):
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
        if job.builds:
            self.builds.waiting[job.id] = job
        else:
            self._quick = self._quick.seen(now, self.config.rate_tau_s)
            self.queues[job.role].push(job)

    def built(self, job_id: str, seconds: float | None) -> JobView | None:
        """A builder is done with a job, which waits for a slot now: returns it, None when it was cancelled meanwhile.

        seconds: None where they say nothing of its kind.
        """
        job = self.builds.built(job_id, seconds)
        if job is not None:
            job = job._replace(builds="")
            self.queues[job.role].push(job)
        return job

    def lose_builders(self) -> None:
        """There are no builders any more: their jobs are built in the slots, from the start."""
        for job in list(self.builds.building.values()):
            del self.builds.building[job.id]
            self.builds.waiting[job.id] = job
        self.builds.lose_builders()

    def _queued(self, job_id: str) -> bool:
        return job_id in self.builds or any(job_id in queue.jobs for queue in self.queues.values())

    def expected_s(self, search: str, role: Role, default: float) -> float:
        """Estimate for the search's next job: its own history, else the role's, else default."""
        return self._measured.get((search, role)) or self._service[role] or default

    def release(self, index: int, now: float, busy_s: float, *, finished: bool = True) -> JobView | None:
        """A GPU is done, with its job (returned), or with a switch without one. busy_s: GPU-seconds that the job took.

        finished: False for a killed job, whose seconds are charged but say nothing about service times.
        """
        gpu = self._gpus[index]
        if gpu.idle:
            raise ValueError(f"gpu={index}: it has nothing to be released from")
        self._gpus.rest(index)
        job, gpu.job = gpu.job, None
        if job is None:
            return None
        self.builds.leave(job.id)
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
        for job in (self.builds.cancel(job_id), *(queue.remove(job_id) for queue in self.queues.values())):
            if job is not None:
                self.builds.leave(job_id)
                self.searches[job.search].waiting -= 1
                return Cancelled((job_id,), ())
        return Cancelled((), (self._running[job_id],) if job_id in self._running else ())

    def cancel_search(self, search: str) -> Cancelled:
        """Queued jobs of the search leave now; its running ones are named, the pool kills and releases them."""
        if search not in self.searches:
            raise ValueError(f"search={search!r}: the pool does not know it")
        queued = [job.id for queue in self.queues.values() for job in queue.of_search(search)]
        queued += [job.id for job in self.builds if job.search == search]
        for job_id in queued:
            self.cancel(job_id)
        running = [index for index in self._running.values() if self._job(index).search == search]
        return Cancelled(tuple(queued), tuple(running))

    def end_search(self, search: str) -> None:
        """Forget a search that has no jobs left."""
        state = self.searches.get(search)
        if state is None or state.waiting or state.running:
            raise ValueError(
                f"search={search!r}: {'unknown' if state is None else 'it still has jobs; cancel them first'}"
            )
        del self.searches[search]
        for role in Role:
            self._measured.pop((search, role), None)

    def estimate(self, role: Role, arrival_per_s: float, service_s: float, now: float) -> None:
        """Set what has been learnt of a role, as when a pool starts again from its journal."""
        self._rates[role] = Rate(arrival_per_s, now)
        self._service[role] = service_s or self._service[role]

    def load(self, role: Role, now: float) -> RoleLoad:
        queue, gpus = self.queues[role], self._gpus
        return RoleLoad(
            len(queue),
            queue.waiting_s,
            gpus.counts[role],
            len(gpus.idle[role]),
            self._rates[role].at_time(now, self.config.rate_tau_s),
            self._service[role],
            queue.oldest,
            gpus.coming[role],
        )

    def admission(self, wanted: int, remaining_s: float, now: float, **fork: float) -> Admission:
        """Advice for a search that would make `wanted` forks now. fork: compile_s and so on, as policy.admit."""
        return admit(wanted, remaining_s, *self.loads(now), **fork)  # type: ignore[arg-type]

    def loads(self, now: float) -> tuple[RoleLoad, RoleLoad]:
        """Of validating and of profiling."""
        return self.load(Role.VALIDATE, now), self.load(Role.PROFILE, now)

    def starts_per_s(self, now: float) -> float:
        """Jobs that will begin in a second (policy.starts_per_s)."""
        return sum(starts_per_s(self.load(role, now)) for role in Role)

    def decide(self, now: float) -> Decision:
        """Give jobs to idle GPUs. Afterwards a GPU idles beside waiting work only where the switching rules say so."""
        self._gpus.wake(now)
        expired = tuple(self._expire(now))
        builds = tuple(self._build(now))
        assignments: list[Assignment] = []
        for role in (Role.PROFILE, Role.VALIDATE):
            while self._gpus.idle[role] and len(self.queues[role]):
                assignments.append(self._serve(role, now))
        for role in Role:
            self._lend(role, now, assignments)
        waiting = any(len(queue) for queue in self.queues.values())
        return Decision(tuple(assignments), expired, self._gpus.next_wake() if waiting else None, builds)

    def gpu_roles(self) -> dict[int, Role]:
        return self._gpus.roles()

    def _build(self, now: float) -> Iterator[JobView]:
        """Builds that begin now. Where there are no builders their jobs go to the slots' queues, so many at once."""
        quick_per_s = self._quick.at_time(now, self.config.rate_tau_s)
        while self.builds.waiting and self.builds.free(len(self._gpus), quick_per_s) > 0:
            job = self.builds.begin()
            if self.builds.slots is None:
                self.queues[job.role].push(job)
            else:
                yield job

    def _serve(self, role: Role, now: float) -> Assignment:
        """One idle GPU of a role that has work: usually the next job, or a switch to the other role."""
        other = role.other
        if self._gpus.movable[role] and len(self.queues[other]) and not self._gpus.idle[other]:
            view = self._gpus.movable_view(role)
            if should_switch(view, self.load(role, now), self.load(other, now), now, self.config):
                return self._start(view.number, other, now)
        return self._start(None, role, now)

    def _lend(self, role: Role, now: float, out: list[Assignment]) -> None:
        """Idle GPUs of a role without work: to where work waits, or ready for what will come."""
        other = role.other
        while self._gpus.movable[role] and not len(self.queues[role]):
            view = self._gpus.movable_view(role)
            own, theirs = self.load(role, now), self.load(other, now)
            if should_switch(view, own, theirs, now, self.config):
                out.append(self._start(view.number, other, now))
            elif should_prepare(view, own, theirs, now, self.config):
                self._gpus.come(view.number, other, now)
                out.append(Assignment(view.number, other, None, True, 0.0))
            else:
                return

    def _start(self, index: int | None, role: Role, now: float) -> Assignment:
        """index: None for any idle GPU of the role, the one that rested last unless place() prefers another."""
        fair = fairness_binds(self.load(role, now), len(self._gpus), self.config)
        job = self.queues[role].pop(fair=fair)
        assert job is not None
        if index is None and self._place is not None:
            index = self._place(job, self._gpus.rested_last(role, MOST_PLACES))
        if index is None:
            index = self._gpus.rested_last(role, 1)[0]
        gpu, state = self._gpus[index], self.searches[job.search]
        switch = self._gpus.occupy(index, role, now)
        gpu.job = job
        self._running[job.id] = index
        state.waiting -= 1
        state.running += 1
        if fair:
            self._floor = max(self._floor, state.attained_s / state.weight - max(self.config.head_start_s))
        state.attained_s += job.expected_s
        for queue in self.queues.values():
            queue.refresh(job.search)
        return Assignment(index, role, job, switch, quiet_s(role, job.expected_s, self.config))

    def _learn(self, job: JobView, busy_s: float) -> None:
        weight = self.config.service_weight
        self._service[job.role] += weight * (busy_s - self._service[job.role])
        own = self._measured.get((job.search, job.role), busy_s)
        self._measured[job.search, job.role] = own + 0.5 * (busy_s - own)

    def _expire(self, now: float) -> Iterator[JobView]:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, job_id, role = heapq.heappop(self._deadlines)
            job = self.queues[role].remove(job_id) or self.builds.waiting.pop(job_id, None)
            if job is not None:
                self.builds.leave(job_id)
                self.searches[job.search].waiting -= 1
                yield job

    def check_integrity(self) -> None:
        """Raises AssertionError when counts, queues and GPUs contradict each other; for tests and idle moments."""
        self._gpus.check_integrity()
        at_work = {job.id: index for index, job in self._gpus.at_work()}
        assert at_work == self._running, f"running: {self._running} noted, {at_work} at work"
        lines: list[Iterable[JobView]] = [*self.queues.values(), self.builds]
        for name, state in self.searches.items():
            waiting = sum(job.search == name for line in lines for job in line)
            running = sum(self._job(index).search == name for index in at_work.values())
            assert (state.waiting, state.running) == (waiting, running), (
                f"{name}: {state}, {waiting} wait, {running} run"
            )

    def _job(self, index: int) -> JobView:
        job = self._gpus[index].job
        assert job is not None
        return job


def plan(snapshot: Snapshot, config: PolicyConfig | None = None) -> Decision:
    """The decision for a whole pool, from nothing but its snapshot: what PoolState.decide says after the same events.

    Raises ValueError for a job of a search that the snapshot does not name.
    """
    state = PoolState(config)
    for name, weight, attained_s in snapshot.searches:
        state.add_search(name, weight)
        state.searches[name].attained_s = attained_s
    for gpu in snapshot.gpus:
        state.add_gpu(gpu.number, gpu.role, gpu.switched)
    for job in sorted(snapshot.jobs, key=lambda job: (job.submitted, job.fork)):
        state.submit(job, snapshot.now)
    number = max((gpu.number for gpu in snapshot.gpus), default=-1)
    for role in Role:
        state.estimate(role, snapshot.arrival_per_s.get(role, 0.0), snapshot.service_s.get(role, 0.0), snapshot.now)
        for _ in range(snapshot.busy.get(role, 0)):
            number += 1
            state.add_gpu(number, role, idle=False)
    return state.decide(snapshot.now)
