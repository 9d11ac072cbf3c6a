"""The books of a live pool: which jobs and searches there are, how each job ended, what it cost.

A job's outcome goes to the journal first and to whoever waits after it, so that memory never knows more than the file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..evaluation.base import Status, Verdict
from .accounting import Account, Outcome
from .base import JobStage, SlotUp
from .job import PoolJob, outcome_text
from .journal import Journal, JournalError

if TYPE_CHECKING:
    from .metrics import PoolMetrics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Search:
    """ended: it takes no more jobs; it is forgotten with its last one."""

    jobs: dict[str, PoolJob] = field(default_factory=dict)
    ended: bool = False


class Ledger:
    """Jobs until they end; counts, seconds and the journal beyond that. device: of verdicts that no worker gave."""

    def __init__(self, journal: Journal, metrics: PoolMetrics | None) -> None:
        self.journal, self.account, self.metrics = journal, Account(), metrics
        self.jobs: dict[str, PoolJob] = {}
        self.searches: dict[str, Search] = {}
        self.done: dict[str, int] = {}
        self.device = ""
        self._units: dict[str, int] = {}

    def add(self, job: PoolJob) -> bool:
        """Whether it is new here; one that is retried is not."""
        new = job.id not in self.jobs
        self.jobs[job.id] = self.searches[job.order.search].jobs[job.id] = job
        return new

    def of_search(self, search: str) -> list[PoolJob]:
        known = self.searches.get(search)
        return [job for job in known.jobs.values() if not job.result.done()] if known else []

    def waiting(self) -> list[PoolJob]:
        return [job for job in self.jobs.values() if job.slot is None]

    def drop_if_over(self, search: str) -> bool:
        """Forget a search that has ended, with its last job."""
        known = self.searches.get(search)
        if known is None or not known.ended or known.jobs:
            return False
        del self.searches[search]
        return True

    # -- how jobs end ----------------------------------------------------------------------------------------------

    def finish(self, job: PoolJob, value: Any) -> None:
        """A worker's word; where the journal had an outcome before it, that stands."""
        if job.order.stage is JobStage.CHECK_TASK or self._written(
            lambda: self.journal.finish(job.id, job.attempt, outcome_text(value))
        ):
            self.end(job, value)
        else:
            self.end(job, job.failed(Status.CANCELLED, "it was ended while it ran", self.device))

    def report(self, job: PoolJob, status: Status, reason: str) -> None:
        """End a job without a worker's word."""
        if job.order.stage is JobStage.CHECK_TASK:
            self.end(job, reason)
            return
        value = job.failed(status, reason, self.device)
        self._written(lambda: self.journal.report(job.id, outcome_text(value)))
        self.end(job, value)

    def begin(self, job: PoolJob, owner: str) -> int | None:
        """The number of an attempt that begins now; None when the job may not (any more)."""
        if job.order.stage is JobStage.CHECK_TASK:
            return job.tries + 1
        attempt: int | None = None

        def start() -> bool:
            nonlocal attempt
            attempt = self.journal.start(job.id, owner)
            return True

        self._written(start)
        return attempt

    def _written(self, write: Callable[[], bool]) -> bool:
        """Whether the journal took it. One that cannot be written keeps nobody waiting: its jobs end anyway."""
        try:
            return write()
        except JournalError as error:
            log.error("pool: an outcome is not in the journal, a restart will try its job again: %s", error)
            return True

    def end(self, job: PoolJob, value: Any) -> None:
        """Tell whoever waits; the journal has the outcome already."""
        self.jobs.pop(job.id, None)
        known = self.searches.get(job.order.search)
        if known is not None:
            known.jobs.pop(job.id, None)
        if job.order.stage is not JobStage.CHECK_TASK and not job.result.done():
            status = str(value.status) if isinstance(value, Verdict) else "done"
            self.done[status] = self.done.get(status, 0) + 1
        job.finish(value)

    # -- what they cost --------------------------------------------------------------------------------------------

    def join(self, slot: SlotUp) -> None:
        self.device = self.device or slot.device
        self._units[slot.unit] = self._units.get(slot.unit, 0) + 1
        if self._units[slot.unit] == 1:
            self.account.join(slot.unit, time.monotonic())

    def leave(self, unit: str) -> None:
        self._units[unit] -= 1
        if not self._units[unit]:
            self.account.leave(unit, time.monotonic())

    def outcome_of(self, job: PoolJob, value: Any) -> Outcome:
        if isinstance(value, Verdict) and value.status is Status.CANCELLED:
            return Outcome.CANCELLED
        known = self.searches.get(job.order.search)
        late = bool(job.cancelled) or known is None or known.ended
        return Outcome.SUPERSEDED if late else Outcome.USEFUL

    def count(self, job: PoolJob, outcome: Outcome) -> None:
        """One that ended in its build: it took no GPU."""
        if self.metrics is not None:
            self.metrics.record(job.order.search, job.order.stage, outcome, 0.0)

    def charge(self, unit: str, job: PoolJob, outcome: Outcome, busy_s: float | None = None) -> None:
        """busy_s: as the worker measured it; for one that was cut off, since its first stage on the GPU."""
        if job.order.stage is JobStage.CHECK_TASK:
            return
        now = time.monotonic()
        if busy_s is None:
            busy_s = 0.0 if job.busy_since is None else now - job.busy_since
        self.account.record(job.order.search, job.order.stage, outcome, unit, busy_s, now)
        if self.metrics is not None:
            self.metrics.record(job.order.search, job.order.stage, outcome, busy_s)
            self.metrics.shares(self.account.utilisation(now))
