"""The live pool: the policy's decisions carried out on a backend, with the journal and the account kept on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from ..evaluation.base import Candidate, Status, Task
from .base import JobStage
from .dispatch import TRIES, Dispatcher, status_text
from .job import Order, PoolJob, order_of
from .journal import Recovered
from .ledger import Search
from .policy import Admission, Role, RoleLoad
from .policy_state import PoolState

START_S = 180.0
CHECKS_WEIGHT = 1e12
"""Of the checks of references, which come before all else."""


class Driver(Dispatcher):
    """See evaluation.base.Pool. The slots come from the backend, one process drives them.

    journal: where jobs outlive this process (default: in memory, for this life only).
    strict: a job must name a search that open_search() opened; else its first job opens it.
    first_role: of a slot that comes up.
    """

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every slot and wait for the first to be ready. Raises RuntimeError when none comes up."""
        self.start_soon()
        first = [asyncio.ensure_future(one.wait()) for one in (self._up, self._hopeless)]
        await asyncio.wait(first, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        for waiting in first:
            waiting.cancel()
        if not self._up.is_set():
            fault = self.fault or f"none is ready after {START_S:g} s"
            await self.close()
            raise RuntimeError(f"no evaluation worker starts: {fault}")

    def start_soon(self) -> None:
        """Start slots without waiting; jobs may be submitted at once."""
        if not self._open:
            self._open = True
            self.backend.open(self._told)

    def resume(self, *, retry: bool) -> Recovered:
        """What the journal knows of an earlier life: its open jobs wait again (`retry`), or are reported as crashed.

        Call before the first submit. A job whose text cannot be read, or whose deadline is over, is reported.
        """
        lost = status_text(Status.CRASH, "the pool's process ended under it")
        _, reported = self.ledger.journal.recover(tries=TRIES if retry else 0, outcome=lost)
        kept = []
        for entry in self.ledger.journal.waiting():
            try:
                order = Order.from_json(entry.payload)
            except (ValueError, KeyError, TypeError):
                order = None
            late = order is not None and order.deadline is not None and order.deadline <= time.time()
            if order is None or late or not retry:
                text = status_text(Status.TIMEOUT, "its deadline passed while no pool ran") if late else lost
                self.ledger.journal.report(entry.id, text)
                reported = (*reported, entry._replace(state="reported", outcome=text))
                continue
            if order.search not in self.ledger.searches:
                self.open_search(order.search)
            self._enqueue(self._job(entry.id, order, tries=entry.attempt))
            kept.append(entry)
        self._decide()
        return Recovered(tuple(kept), reported)

    async def close(self) -> None:
        """Cancel every job, end every slot and what it started; returns when they are gone."""
        if self.closing:
            return
        self.closing = True
        if self._wake is not None:
            self._wake.cancel()
        for job in self.ledger.waiting():
            self.state.cancel(job.id)
            self._report(job, Status.CANCELLED, "the pool was closed")
        await self.backend.close()
        for job in list(self.ledger.jobs.values()):
            self._report(job, Status.CANCELLED, "the pool was closed under it")
        self.ledger.journal.close()

    # -- jobs ------------------------------------------------------------------------------------------------------

    def open_search(self, search: str, weight: float = 1.0) -> None:
        """Raises ValueError when it is open, or weight is not above 0."""
        known = self.ledger.searches.get(search)
        if known is None:
            self.state.add_search(search, weight)
            self.ledger.searches[search] = Search()
        elif known.ended:
            known.ended = False
        else:
            raise ValueError(f"search={search!r}: it is in the pool already")

    def submit(
        self,
        task: Task,
        candidate: Candidate,
        *,
        search: str,
        priority: float = 0.0,
        deadline: float | None = None,
        stage: JobStage | str = JobStage.EVALUATE,
        fork: int = 0,
        could_end: bool | None = None,
        since: float | None = None,
        job: str | None = None,
        options: Mapping[str, object] | None = None,
    ) -> PoolJob:
        """Queue one stage of a candidate. deadline is a time.monotonic() value.

        fork: the fork's number in its search; the newest goes first (equal ones by age).  could_end: a good result
        would end the reasoning (default: when its priority is above 0, and what comes after the verdict).
        since: time.monotonic() of the candidate's first job, so that a late one is profiled first.  job: its id.
        options: more of the worker's request, as JSON can carry it.
        Raises ValueError for a deadline that has passed, a stage or search that is not known, an id that is taken.
        """
        if self.closing:
            raise ValueError("the pool is closed")
        order = order_of(
            task, candidate, search, stage=stage, priority=priority, deadline=deadline, fork=fork, could_end=could_end,
            options=options,
        )  # fmt: skip
        known = self.ledger.searches.get(search)
        if self.strict and (known is None or known.ended):
            raise ValueError(
                f"search={search!r}: {'it has ended' if known else 'the pool does not know it'}; open it first"
            )
        if known is None or known.ended:
            self.open_search(search)
        name = job or f"{self.life}/{next(self._numbers)}"
        self.ledger.journal.submit(name, search, order.stage, order.to_json())
        queued = self._job(name, order, since=since)
        self._enqueue(queued)
        self._decide()
        return queued

    async def check_task(self, task: Task) -> str | None:
        """Runs the reference in a worker; None when usable, else one line. Before everything that waits."""
        if self.closing:
            return "the pool is closed"
        order = Order(JobStage.CHECK_TASK, task, None, "", float("inf"), could_end=True)
        if "" not in self.ledger.searches:
            self.open_search("", CHECKS_WEIGHT)
        job = self._job(f"{self.life}/{next(self._numbers)}", order)
        self._enqueue(job)
        self._decide()
        fault: str | None = await job.outcome()
        return fault

    def cancel_search(self, search: str, why: str = "cancelled") -> int:
        """Cancel queued and running jobs of a search that is over, with that reason; returns how many."""
        known = self.ledger.searches.get(search)
        if known is None:
            return 0
        jobs = self.ledger.of_search(search)
        known.ended = True
        for job in jobs:
            self.cancel(job, why)
        self._forget_search(search)
        return len(jobs)

    def admission(self, wanted: int, remaining_s: float, **fork: float) -> Admission:
        """How many of the forks wanted would be judged in time; `fork` and the answer as policy.admit has them."""
        if not isinstance(self.state, PoolState):
            return Admission(wanted, 0.0, "")
        return self.state.admission(wanted, remaining_s, time.monotonic(), **fork)

    def loads(self) -> tuple[RoleLoad, RoleLoad] | None:
        """What admission is decided from, for who is asked elsewhere; None under a policy without estimates."""
        return self.state.loads(time.monotonic()) if isinstance(self.state, PoolState) else None

    def snapshot(self) -> dict[str, object]:
        roles, account = self.state.gpu_roles(), self.ledger.account
        busy = sum(slot.job is not None for slot in self._evaluators.values())
        building = sum(job.build_began is not None for job in self.ledger.jobs.values())
        return {
            **self.backend.describe(),
            "ready": len(self._evaluators),
            "busy": busy,
            "queued": len(self.ledger.jobs) - busy - building,
            "building": building,
            "finished": dict(self.ledger.done),
            "sandbox": self._sandbox,
            "roles": {role.value: sum(one is role for one in roles.values()) for role in Role},
            "utilisation": {unit: round(share, 4) for unit, share in account.utilisation(time.monotonic()).items()},
            "gpu_seconds": {outcome.value: round(s, 3) for outcome, s in account.by_outcome().items()},
        }
