"""Carrying out decisions: what a backend says becomes the policy's events, its assignments become work for slots.

Everything happens on one event loop; nothing here blocks but SQLite.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..evaluation.base import Stage, Status, Verdict
from ..evaluation.limits import EvaluationLimits
from .accounting import Outcome
from .base import (
    BUSY_STAGES,
    STAGES,
    Backend,
    Built,
    Done,
    Event,
    JobStage,
    NoBuilder,
    NoSlot,
    Reached,
    SlotDown,
    SlotUp,
    Switched,
    Work,
    busy_seconds,
    verdict_of,
)
from .builds import BuildDesk
from .job import Order, PoolJob, outcome_text
from .journal import Journal
from .ledger import Ledger
from .policy import JobView, PolicyConfig, Role
from .policy_state import Assignment, Cancelled, Decision, PoolState

if TYPE_CHECKING:
    from .metrics import PoolMetrics

log = logging.getLogger(__name__)

CANCEL_S = 5.0
"""A running job that was cancelled and does not end within it has its slot killed."""
EXPECTED_S = 5.0
EXPECT_S = 0.1
KEPT_TASKS = EvaluationLimits().judges
"""How often at most a backend is told what comes."""
TRIES = 2


class PolicyState(Protocol):
    """What decides; PoolState, or a baseline of the elastic study."""

    def add_search(self, search: str, weight: float = 1.0) -> None: ...
    def end_search(self, search: str) -> None: ...
    def add_gpu(self, index: int, role: Role) -> None: ...
    def remove_gpu(self, index: int) -> JobView | None: ...
    def gpu_roles(self) -> dict[int, Role]: ...
    def submit(self, job: JobView, now: float) -> None: ...
    def release(self, index: int, now: float, busy_s: float, *, finished: bool = True) -> JobView | None: ...
    def cancel(self, job_id: str) -> Cancelled: ...
    def decide(self, now: float) -> Decision: ...
    def expected_s(self, search: str, role: Role, default: float) -> float: ...


@dataclass(slots=True)
class _Slot:
    unit: str
    device: str
    job: PoolJob | None = None
    waits: Assignment | None = None  # what begins once it has switched


class Dispatcher:
    """The inner half of a pool (driver.Driver is the outer one): slots, running jobs, when to decide."""

    def __init__(
        self,
        backend: Backend,
        *,
        journal: Journal | None = None,
        config: PolicyConfig | None = None,
        state: PolicyState | None = None,
        first_role: Callable[[int], Role] = lambda slot: Role.VALIDATE,
        strict: bool = False,
        metrics: PoolMetrics | None = None,
    ) -> None:
        self.backend, self.strict, self.first_role = backend, strict, first_role
        self.config = config or PolicyConfig()
        slots = getattr(backend, "build_slots", None) or None
        self.state: PolicyState = state or PoolState(self.config, place=self._place, build_slots=slots)
        self.ledger = Ledger(journal or Journal.in_memory(), metrics)
        self.builds = BuildDesk(self.state, backend)
        self.closing = False
        self.fault = ""
        self.life = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count(1)
        self._evaluators: dict[int, _Slot] = {}
        self._tasks_at: dict[int, list[str]] = {}  # those whose references a slot has at hand, the latest last
        self._sandbox = ""
        self._up = asyncio.Event()
        self._hopeless = asyncio.Event()
        self._open = False
        self._wake: asyncio.TimerHandle | None = None
        self._deciding = self._again = False
        self._saying: asyncio.TimerHandle | None = None

    # -- what the backend says ---------------------------------------------------------------------------------------

    def _told(self, event: Event) -> None:
        if self.closing:
            return
        match event:
            case SlotUp():
                self._slot_up(event)
            case SlotDown():
                self._slot_down(event)
            case Switched(number):
                self._switched(number)
            case Reached(number, name, attempt, stage):
                job = self._running(number, name, attempt)
                if job is not None:
                    if stage is not Stage.COMPILE or not job.built_s:
                        job.advance(stage)
                    if stage in BUSY_STAGES and job.busy_since is None:
                        job.busy_since = time.monotonic()
            case Done(number, name, attempt, message):
                job = self._running(number, name, attempt)
                if job is not None:
                    self._finished(number, job, message)
            case NoSlot(why):
                self._give_up(why)
            case Built():
                self._built(event)
            case NoBuilder(why):
                log.warning("pool: C++ candidates are built by the workers that check them: %s", why)
                self.builds.lost(self.ledger.jobs.values())
        self._decide()

    def _slot_up(self, event: SlotUp) -> None:
        self._evaluators[event.slot] = _Slot(event.unit, event.device)
        self._sandbox = event.sandbox or self._sandbox
        self.state.add_gpu(event.slot, self.first_role(event.slot))
        self.ledger.join(event)
        self._up.set()

    def _slot_down(self, event: SlotDown) -> None:
        slot = self._evaluators.pop(event.slot, None)
        if slot is None:
            return
        log.info("pool: slot %d (%s) is gone: %s", event.slot, slot.unit, event.why)
        self._tasks_at.pop(event.slot, None)
        self.state.remove_gpu(event.slot)
        if slot.job is not None:
            self.ledger.charge(slot.unit, slot.job, Outcome.CANCELLED)
            self._lost(event.slot, slot, slot.job)
        self.ledger.leave(slot.unit)

    def _lost(self, number: int, slot: _Slot, job: PoolJob) -> None:
        """The slot of a job died under it: once more, then it is a crash. The journal counts the attempts."""
        job.slot, job.busy_since = None, None
        crash = "its worker was killed under it"
        if job.order.stage is JobStage.CHECK_TASK:
            self._report(job, Status.CRASH, "the worker that ran the reference was killed")
        elif job.cancelled:
            self._report(job, Status.CANCELLED, job.cancelled)
        elif job.attempt == 0:  # it had not begun
            self._enqueue(job)
        else:
            job.tries += 1
            again, _ = self.ledger.journal.recover(
                self._owner(number), tries=TRIES, outcome=status_text(Status.CRASH, crash)
            )
            if any(entry.id == job.id for entry in again):
                self._enqueue(job)
            else:
                self.ledger.end(job, job.failed(Status.CRASH, crash, slot.device))
                self._forget_search(job.order.search)

    def _switched(self, number: int) -> None:
        slot = self._evaluators.get(number)
        if slot is None:
            return
        waits, slot.waits = slot.waits, None
        if waits is not None and slot.job is not None:
            self._begin(number, slot, slot.job, waits)
        elif slot.job is None:
            self.state.release(number, time.monotonic(), 0.0)

    def _finished(self, number: int, job: PoolJob, message: dict[str, Any]) -> None:
        slot, now = self._evaluators[number], time.monotonic()
        value: Any = message.get("task")
        if job.order.stage is not JobStage.CHECK_TASK:
            try:
                value = verdict_of(message["verdict"], job.waited())
            except (KeyError, TypeError, ValueError) as error:
                value = job.failed(Status.CRASH, f"the worker's answer cannot be read: {error!r}", slot.device)
        outcome = self.ledger.outcome_of(job, value)
        killed = outcome is Outcome.CANCELLED
        busy_s = busy_seconds(value.stages) if isinstance(value, Verdict) and not killed else None
        self.ledger.charge(slot.unit, job, outcome, busy_s)
        slot.job = None
        self.state.release(number, now, now - job.began, finished=not killed)
        self.ledger.finish(job, value)
        self._forget_search(job.order.search)

    def _built(self, event: Built) -> None:
        """Its library is there, or it has failed: then that is its verdict."""
        job = self.ledger.jobs.get(event.job)
        if not self.builds.done(job, event) or job is None or event.message is None:
            return
        attempt = self.ledger.begin(job, f"{self.life}/builder")
        self.state.cancel(job.id)
        if attempt is None:
            self._report(job, Status.CANCELLED, job.cancelled or "it was ended before it began")
            return
        job.attempt = attempt
        try:
            value = verdict_of(event.message["verdict"], job.waited())
        except (KeyError, TypeError, ValueError) as error:
            value = job.failed(Status.CRASH, f"the builder's answer cannot be read: {error!r}", self.ledger.device)
        self.ledger.count(job, self.ledger.outcome_of(job, value))
        self.ledger.finish(job, value)
        self._forget_search(job.order.search)

    def _give_up(self, fault: str) -> None:
        """No slot can start: end what waits, start() raises."""
        self.fault = fault
        self._hopeless.set()
        for job in self.ledger.waiting():
            self.state.cancel(job.id)
            self._report(job, Status.CRASH, f"no evaluation worker starts: {fault}")

    # -- decisions -------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        if self._deciding or self.closing:
            self._again = True
            return
        self._deciding = True
        try:
            self._again = True
            while self._again:
                self._again = False
                decision = self.state.decide(time.monotonic())
                for view in decision.expired:
                    self._report(self.ledger.jobs[view.id], Status.TIMEOUT, "its deadline passed while it waited")
                for view in decision.builds:
                    self.builds.begin(self.ledger.jobs[view.id])
                for assignment in decision.assignments:
                    self._assign(assignment)
        finally:
            self._deciding = False
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if decision.wake_at is not None:
            delay = max(0.0, decision.wake_at - time.monotonic()) + 1e-3
            self._wake = asyncio.get_running_loop().call_later(delay, self._decide)
        if self._saying is None:
            self._saying = asyncio.get_running_loop().call_later(EXPECT_S, self._say_what_comes)

    def _say_what_comes(self) -> None:
        """Backends whose memory is lent have it back before jobs wait for it."""
        self._saying = None
        if isinstance(self.state, PoolState) and not self.closing:
            self.backend.expect(self.state.starts_per_s(time.monotonic()))

    def _assign(self, assignment: Assignment) -> None:
        slot = self._evaluators[assignment.gpu]
        job = self.ledger.jobs[assignment.job.id] if assignment.job else None
        slot.job = job
        if job is not None:
            job.slot, job.attempt = assignment.gpu, 0
        if assignment.switch:
            slot.waits = assignment if job is not None else None
            self.backend.switch(assignment.gpu, assignment.role)
        elif job is not None:
            self._begin(assignment.gpu, slot, job, assignment)

    def _begin(self, number: int, slot: _Slot, job: PoolJob, assignment: Assignment) -> None:
        now = time.monotonic()
        job.began, job.queued_s = now, now - job.submitted - job.built_s
        attempt = self.ledger.begin(job, self._owner(number))
        if attempt is None or job.cancelled:
            slot.job = None
            self.state.release(number, now, 0.0, finished=False)
            self._report(job, Status.CANCELLED, job.cancelled or "it was ended before it began")
            self._again = True
            return
        job.attempt = attempt
        self._note_task(number, job.order.task.hash)
        op, order = STAGES[job.order.stage].op, job.order
        self.backend.run(
            number, Work(job.id, attempt, op, order.task, order.candidate, assignment.quiet_s, order.options)
        )

    def _place(self, job: JobView, idle: list[int]) -> int | None:
        """An idle slot that has the task's reference at hand, else the first that would forget none for it."""
        wanted = self.ledger.jobs[job.id].order.task.hash
        having = (slot for slot in idle if wanted in self._tasks_at.get(slot, ()))
        with_room = (slot for slot in idle if len(self._tasks_at.get(slot, ())) < KEPT_TASKS)
        return next(itertools.chain(having, with_room), None)

    def _note_task(self, number: int, task: str) -> None:
        """A worker keeps the references of its latest tasks; on a GPU another costs it a CUDA context."""
        others = [one for one in self._tasks_at.get(number, ()) if one != task]
        self._tasks_at[number] = [*others, task][-KEPT_TASKS:]

    # -- jobs begin and end ----------------------------------------------------------------------------------------

    def _job(self, name: str, order: Order, tries: int = 0, since: float | None = None) -> PoolJob:
        now = time.monotonic()
        role = STAGES[order.stage].role
        deadline = None if order.deadline is None else now + order.deadline - time.time()
        if order.stage is JobStage.CHECK_TASK:
            since = float("-inf")  # nothing is older
        expected_s = self.state.expected_s(order.search, role, EXPECTED_S)
        view = JobView(
            name, order.search, role, now if since is None else since, expected_s,
            order.fork, order.could_end, order.priority, deadline, self.builds.kind(order),
        )  # fmt: skip
        return PoolJob(pool=self, id=name, order=order, view=view, submitted=now, tries=tries)

    def _enqueue(self, job: PoolJob) -> None:
        """Queue a new job, or one that is retried."""
        now = time.monotonic()
        if job.view.deadline is not None and job.view.deadline <= now:
            self._report(job, Status.TIMEOUT, "its deadline passed before it could be retried")
            return
        self.state.submit(job.view, now)
        if self.ledger.add(job) and job.view.deadline is not None:
            timer = asyncio.get_running_loop().call_later(job.view.deadline - now, self._overdue, job)
            job.result.add_done_callback(lambda _: timer.cancel())

    def cancel(self, job: PoolJob, why: str = "cancelled") -> None:
        """See PoolJob.cancel."""
        if job.result.done():
            return
        if job.slot is None:
            self.state.cancel(job.id)
            self.builds.cancel(job)
            self._report(job, Status.CANCELLED, why)
        elif not job.cancelled:
            job.cancelled = why
            slot = job.slot
            self.backend.cancel(slot, job.id)
            asyncio.get_running_loop().call_later(CANCEL_S, self._insist, slot, job)

    def _overdue(self, job: PoolJob) -> None:
        if job.result.done():
            return
        if job.slot is None:
            self.state.cancel(job.id)
            self.builds.cancel(job)
            self._report(job, Status.TIMEOUT, "its deadline passed while it waited")
        else:
            self.cancel(job, "its deadline passed while it ran")

    def _insist(self, slot: int, job: PoolJob) -> None:
        if not job.result.done() and job.slot == slot:
            self.backend.kill(slot)

    def _report(self, job: PoolJob, status: Status, reason: str) -> None:
        """End a job without a worker's word."""
        self.ledger.report(job, status, reason)
        self._forget_search(job.order.search)

    def _forget_search(self, search: str) -> None:
        if self.ledger.drop_if_over(search) and not self.closing:
            self.state.end_search(search)

    def _running(self, number: int, name: str, attempt: int) -> PoolJob | None:
        """The job that a slot speaks of; None for what it says of an earlier one."""
        slot = self._evaluators.get(number)
        job = slot.job if slot else None
        return job if job is not None and (job.id, job.attempt) == (name, attempt) else None

    def _owner(self, slot: int) -> str:
        return f"{self.life}/slot-{slot}"


def status_text(status: Status, reason: str) -> str:
    return outcome_text(Verdict("", status, reason))
