"""One simulated run of an evaluation pool: simpy moves time, the pool's own policy decides."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import simpy

from bench.elastic_workload import CHECK_MOST_S, ITERATION_S, Candidate, Workload
from specgen_engine.pools.accounting import Account, Outcome
from specgen_engine.pools.policy import JobView, PolicyConfig, Role
from specgen_engine.pools.policy_state import Assignment, Cancelled, Decision, PoolState


class State(Protocol):
    """What the simulator needs of a policy; PoolState is one."""

    def add_search(self, search: str) -> None: ...
    def add_gpu(self, index: int, role: Role) -> None: ...
    def submit(self, job: JobView, now: float) -> None: ...
    def release(self, index: int, now: float, busy_s: float, *, finished: bool = True) -> JobView | None: ...
    def cancel(self, job_id: str) -> Cancelled: ...
    def decide(self, now: float) -> Decision: ...
    def expected_s(self, search: str, role: Role, default: float) -> float: ...


class FifoState:
    """The baselines: jobs in order of arrival. fixed: GPUs keep their roles (a static split), each role its own line.

    Else FIFO elastic: any GPU takes the oldest job, changing roles whenever that job asks for it.
    """

    def __init__(self, *, fixed: bool) -> None:
        self.fixed = fixed
        self._roles: dict[int, Role] = {}
        self._idle: dict[Role, dict[int, None]] = {role: {} for role in Role}
        self._queues: dict[Role, deque[JobView]] = {role: deque() for role in Role}
        self._waiting: set[str] = set()
        self._running: dict[int, JobView] = {}

    def add_search(self, search: str, weight: float = 1.0) -> None:
        """Order of arrival knows no searches."""

    def end_search(self, search: str) -> None:
        """Nor their ends."""

    def add_gpu(self, index: int, role: Role) -> None:
        self._roles[index] = role
        self._idle[role][index] = None

    def remove_gpu(self, index: int) -> JobView | None:
        self._idle[self._roles.pop(index)].pop(index, None)
        return self._running.pop(index, None)

    def gpu_roles(self) -> dict[int, Role]:
        return dict(self._roles)

    def submit(self, job: JobView, now: float) -> None:
        self._queues[job.role].append(job._replace(submitted=now))
        self._waiting.add(job.id)

    def release(self, index: int, now: float, busy_s: float, *, finished: bool = True) -> JobView | None:
        self._idle[self._roles[index]][index] = None
        return self._running.pop(index, None)

    def cancel(self, job_id: str) -> Cancelled:
        if job_id in self._waiting:
            self._waiting.discard(job_id)
            return Cancelled((job_id,), ())
        return Cancelled((), tuple(index for index, job in self._running.items() if job.id == job_id))

    def expected_s(self, search: str, role: Role, default: float) -> float:
        return default

    def decide(self, now: float) -> Decision:
        out = []
        while (role := self._oldest()) is not None:
            own, others = self._idle[role], self._idle[role.other]
            switch = not own
            index = next(iter(others if switch else own))
            del (others if switch else own)[index]
            job = self._queues[role].popleft()
            self._waiting.discard(job.id)
            self._roles[index] = role
            self._running[index] = job
            out.append(Assignment(index, role, job, switch, 0.0))
        return Decision(tuple(out), (), None)

    def _oldest(self) -> Role | None:
        """Role of the oldest job that an idle GPU may take."""
        heads = []
        for role, queue in self._queues.items():
            while queue and queue[0].id not in self._waiting:
                queue.popleft()
            if queue and (self._idle[role] or (not self.fixed and self._idle[role.other])):
                heads.append((queue[0].submitted, role))
        return min(heads)[1] if heads else None


def parse_policy(name: str, gpus: int, config: PolicyConfig) -> tuple[State, list[Role]]:
    """A fresh state and the GPUs' first roles. Raises ValueError unless name is elastic, fifo or static-V-P."""
    half = max(1, gpus // 2)
    roles = [Role.VALIDATE] * half + [Role.PROFILE] * (gpus - half)
    if name == "elastic":
        return PoolState(config), roles
    if name == "fifo":
        return FifoState(fixed=False), roles
    kind, *numbers = name.split("-")
    if kind != "static" or len(numbers) != 2 or not all(one.isdigit() for one in numbers):
        raise ValueError(f"policy={name!r}: use elastic, fifo or static-V-P")
    validate, profile = map(int, numbers)
    if validate < 1 or profile < 1 or validate + profile != gpus:
        raise ValueError(f"policy={name!r}: V and P must be at least 1 and add up to {gpus} GPUs")
    return FifoState(fixed=True), [Role.VALIDATE] * validate + [Role.PROFILE] * profile


class Result(NamedTuple):
    """Of one run. Busy is check, timing and profile work; compiling and role switches are idle.

    utilisation: busy share of all GPUs while a job waits that no GPU has taken.
    utilisation_held: also while the only jobs not begun are held by GPUs that change roles.
    utilisation_whole: of the whole run.  utilisation_useful: of it, what was neither superseded nor cancelled.
    feedback_s: from compiled to judged, what the pool decides; submit_s: from submitted, so with the compile.
    min_share: min_fair_share.  switch_gap_s: least time between two switches of a GPU.  decision_*: submit or release,
    and decide, in microseconds of this machine.
    """

    utilisation: float
    utilisation_held: float
    utilisation_whole: float
    utilisation_useful: float
    p50_feedback_s: float
    p95_feedback_s: float
    p95_submit_s: float
    judged: int
    cancelled: int
    min_share: float
    switches_per_gpu_s: float
    switch_gap_s: float
    decision_us: float
    decision_p99_us: float
    decision_max_us: float


@dataclass(slots=True)
class _Clock:
    """Integrals over time of what the GPUs do, kept at each change."""

    gpus: int
    at: float = 0.0
    busy: int = 0
    waiting: int = 0
    waits_s: float = 0.0
    busy_while_waiting_s: float = 0.0
    held: int = 0
    queued_s: float = 0.0
    busy_while_queued_s: float = 0.0
    busy_s: float = 0.0

    def move(self, now: float, busy: int = 0, waiting: int = 0, held: int = 0) -> None:
        passed = now - self.at
        if passed > 0:
            self.busy_s += passed * self.busy
            if self.waiting:
                self.waits_s += passed
                self.busy_while_waiting_s += passed * self.busy
            if self.waiting > self.held:
                self.queued_s += passed
                self.busy_while_queued_s += passed * self.busy
        self.at = now
        self.held += held
        self.busy += busy
        self.waiting += waiting

    def share(self, gpu_s: float, of_s: float) -> float:
        return gpu_s / (self.gpus * of_s) if of_s > 0 else 1.0


class Simulation:
    """Each job of the pool is one stage of a candidate: job ids are its number and the first letter of its role."""

    def __init__(self, load: Workload, state: State, config: PolicyConfig) -> None:
        self.load, self.state, self.config = load, state, config
        self.env = simpy.Environment()
        self.account, self.clock = Account(), _Clock(load.gpus)
        self.candidates = {candidate.number: candidate for candidate in load.candidates}
        self.ended: dict[tuple[int, int], float] = {}
        self.live: dict[tuple[int, int], dict[str, Candidate]] = defaultdict(dict)
        self.running: dict[int, simpy.Process] = {}
        self.feedback: list[float] = []
        self.since_submission: list[float] = []
        self.began: dict[int, tuple[int, float]] = {}
        self.attained: dict[int, float] = {}
        self.switched: dict[int, float] = {}
        self.switches, self.cancelled = 0, 0
        self.gap_s = float("inf")
        self.decisions: list[float] = []
        self.wake_at = float("inf")

    def run(self, roles: list[Role]) -> None:
        for search in range(self.load.searches):
            self.state.add_search(f"s{search}")
        for gpu, role in enumerate(roles):
            self.state.add_gpu(gpu, role)
            self.account.join(gpu, 0.0)
        self.env.process(self.arrivals())
        self.env.run(until=self.load.length_s)
        self.attained = self.attained_now()
        self.env.run()

    def attained_now(self) -> dict[int, float]:
        totals = dict.fromkeys(range(self.load.searches), 0.0)
        for spent, seconds in self.account.seconds.items():
            totals[int(spent.search[1:])] += seconds
        for search, began in self.began.values():
            totals[search] += self.env.now - began
        return totals

    def arrivals(self) -> Generator[Any, Any, None]:
        for candidate in self.load.candidates:
            yield self.env.timeout(max(0.0, candidate.ready_s - self.env.now))
            ended = self.ended.get((candidate.search, candidate.iteration))
            if ended is None:
                self.submit(candidate, Role.VALIDATE)
            else:
                self.cancelled += candidate.submitted_s < ended

    def submit(self, candidate: Candidate, role: Role) -> None:
        now, search = self.env.now, f"s{candidate.search}"
        started = time.perf_counter()
        expected = self.state.expected_s(search, role, 5.0)
        ends = role is Role.PROFILE
        job = JobView(f"{candidate.number}{role[0]}", search, role, candidate.ready_s, expected, candidate.fork, ends)
        self.state.submit(job, now)
        spent = time.perf_counter() - started
        self.live[candidate.search, candidate.iteration][job.id] = candidate
        self.clock.move(now, waiting=1)
        self.decide(spent)

    def decide(self, spent: float = 0.0) -> None:
        started = time.perf_counter()
        decision = self.state.decide(self.env.now)
        self.decisions.append(spent + time.perf_counter() - started)
        for assignment in decision.assignments:
            self.running[assignment.gpu] = self.env.process(self.execute(assignment))
        if decision.wake_at is not None and decision.wake_at < self.wake_at:
            self.wake_at = decision.wake_at
            self.env.process(self.wake(decision.wake_at))

    def wake(self, at: float) -> Generator[Any, Any, None]:
        yield self.env.timeout(max(0.0, at - self.env.now) + 1e-6)
        if self.wake_at == at:
            self.wake_at = float("inf")
        self.decide()

    def execute(self, assignment: Assignment) -> Generator[Any, Any, None]:
        """What a GPU does from one decision to the next: perhaps a switch, perhaps a job, perhaps killed on the way."""
        job, held, began, killed = assignment.job, None, None, False
        try:
            if assignment.switch:
                self.count_switch(assignment.gpu)
                self.clock.move(self.env.now, held=int(job is not None))
                yield self.env.timeout(self.config.switch_s)
                self.clock.move(self.env.now, held=-int(job is not None))
            if job is not None:
                held = self.env.now
                self.clock.move(held, waiting=-1)
                candidate = self.candidate(job)
                checks = job.role is Role.VALIDATE
                if idle_s := candidate.check_idle_s if checks else candidate.profile_idle_s:
                    yield self.env.timeout(idle_s)
                began = self.env.now
                self.clock.move(began, busy=1)
                self.began[assignment.gpu] = candidate.search, began
                yield self.env.timeout(candidate.check_s if checks else candidate.profile_s)
        except simpy.Interrupt:
            killed = True
        now = self.env.now
        busy_s = 0.0 if began is None else now - began
        started = time.perf_counter()
        self.state.release(assignment.gpu, now, 0.0 if held is None else now - held, finished=not killed)
        spent = time.perf_counter() - started
        self.running.pop(assignment.gpu)
        self.began.pop(assignment.gpu, None)
        if job is not None:
            self.clock.move(now, busy=-1 if began is not None else 0, waiting=-1 if held is None else 0)
            self.after(job, assignment.gpu, busy_s, killed)
        self.decide(spent)

    def candidate(self, job: JobView) -> Candidate:
        return self.candidates[int(job.id[:-1])]

    def after(self, job: JobView, gpu: int, busy_s: float, killed: bool) -> None:
        """Account for a job that is over, and let its candidate go on: to profiling, or to its feedback."""
        candidate, now = self.candidate(job), self.env.now
        key = candidate.search, candidate.iteration
        late = now > (candidate.iteration + 1) * ITERATION_S - self.load.offsets[candidate.search]
        outcome = Outcome.CANCELLED if killed else Outcome.SUPERSEDED if late else Outcome.USEFUL
        self.account.record(job.search, job.role, outcome, gpu, busy_s)
        self.live[key].pop(job.id, None)
        if killed:
            self.cancelled += 1
        elif job.role is Role.VALIDATE and candidate.correct:
            self.submit(candidate, Role.PROFILE)
        else:
            self.feedback.append(now - candidate.ready_s)
            self.since_submission.append(now - candidate.submitted_s)
            if candidate.ends and not late:
                self.end_reasoning(key)

    def end_reasoning(self, key: tuple[int, int]) -> None:
        self.ended[key] = self.env.now
        for job_id in list(self.live.pop(key, ())):
            queued, running = self.state.cancel(job_id)
            if queued:
                self.clock.move(self.env.now, waiting=-1)
                self.cancelled += 1
            for gpu in running:
                self.running[gpu].interrupt()

    def wanted(self, before_s: float) -> dict[int, float]:
        """GPU-seconds that each search could have had by the end of the arrivals, from candidates ready before_s."""
        totals = dict.fromkeys(range(self.load.searches), 0.0)
        end = self.load.length_s
        for candidate in self.load.candidates:
            until = min(end, self.ended.get((candidate.search, candidate.iteration), end))
            if candidate.ready_s < before_s:
                left = max(0.0, until - candidate.ready_s)
                totals[candidate.search] += min(candidate.check_s + candidate.profile_s, left)
        return totals

    def count_switch(self, gpu: int) -> None:
        now = self.env.now
        if gpu in self.switched:
            self.gap_s = min(self.gap_s, now - self.switched[gpu])
        self.switched[gpu] = now
        self.switches += 1

    def result(self) -> Result:
        clock, load = self.clock, self.load
        clock.move(self.env.now)
        outcomes = self.account.by_outcome()
        decisions = sorted(self.decisions)
        return Result(
            utilisation=clock.share(clock.busy_while_queued_s, clock.queued_s),
            utilisation_held=clock.share(clock.busy_while_waiting_s, clock.waits_s),
            utilisation_whole=clock.share(clock.busy_s, clock.at),
            utilisation_useful=clock.share(outcomes[Outcome.USEFUL], clock.at),
            p50_feedback_s=percentile(self.feedback, 0.5),
            p95_feedback_s=percentile(self.feedback, 0.95),
            p95_submit_s=percentile(self.since_submission, 0.95),
            judged=len(self.feedback),
            cancelled=self.cancelled,
            min_share=min_fair_share(
                self.attained, self.wanted(load.length_s), self.wanted(load.length_s - 2 * CHECK_MOST_S)
            ),
            switches_per_gpu_s=self.switches / (load.gpus * clock.at),
            switch_gap_s=self.gap_s,
            decision_us=statistics.fmean(decisions) * 1e6,
            decision_p99_us=percentile(decisions, 0.99) * 1e6,
            decision_max_us=decisions[-1] * 1e6,
        )


def min_fair_share(attained: dict[int, float], wanted: dict[int, float], due: dict[int, float]) -> float:
    """Least attained GPU-seconds of a search over its fair share, 0 to 1.

    The fair share is max-min: all that was attained, divided so that each search has what it wanted or an equal part.
    Of it only what was due counts: wanted for long enough that the longest job could have been waited for.
    """
    left, level = sum(attained.values()), float("inf")
    ordered = sorted(wanted.values())
    for index, want in enumerate(ordered):
        equal = left / (len(ordered) - index)
        if want > equal:
            level = equal
            break
        left -= want
    fair = {search: min(seconds, level) for search, seconds in due.items()}
    return min(1.0, 1.0, *(attained[search] / share for search, share in fair.items() if share > 0))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; raises ValueError when there are no values."""
    if not values:
        raise ValueError("no candidate was judged: use a longer run or more load")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def simulate(load: Workload, policy: str, config: PolicyConfig | None = None) -> Result:
    """Raises ValueError for an unknown policy, or when nothing is judged."""
    config = config or PolicyConfig()
    state, roles = parse_policy(policy, load.gpus, config)
    simulation = Simulation(load, state, config)
    simulation.run(roles)
    return simulation.result()
