"""A server's view of the pool on a Ray cluster; the contract is Pool in evaluation/base.py."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import ray
from ray.exceptions import RayActorError, RayError

from ..evaluation.base import Candidate, Status, Task, Verdict
from .base import JobStage
from .job import JobHandle, order_of, outcome_value
from .policy import Admission, RoleLoad, admit
from .ray_backend import quietly
from .ray_head import News, PoolError, connect, find_head

CONNECT_S = 5.0
AGAIN_S = 0.5
SNAPSHOT_S = 1.0
REACH_S = 120.0
"""How long a head that is lost may take to come back before what waits for it ends as a crash."""


@dataclass(eq=False, kw_only=True)
class RayJob(JobHandle):
    """A job whose pool is elsewhere. sent: the head has it, or it was refused and has its result."""

    pool: RayPool
    sent: anyio.Event = field(default_factory=anyio.Event)

    def cancel(self) -> None:
        self.pool.cancel(self)

    def hear(self, news: News) -> None:
        """What was told before, by a head that has died since, is not told again."""
        if news.outcome is not None:
            self.finish(outcome_value(news.outcome))
        elif news.stage is not None:
            self.advance(news.stage)

    def finish(self, value: Any) -> None:
        super().finish(value)
        self.pool.open_jobs.pop(self.id, None)

    def failed(self, status: Status, reason: str) -> Verdict:
        return Verdict(self.order.candidate.hash if self.order.candidate else "", status, reason, device="ray")


class RayPool:
    """See Pool. address: HOST:PORT of the cluster, as `specgen evaluator` prints it; None: Ray is connected already.

    When this process dies the head cancels its jobs; one that takes its place begins anew.
    Raises PoolError when nothing answers at the address (at once, nothing is started).
    """

    def __init__(self, address: str | None) -> None:
        if address is not None:
            require_answer(address, "the pool's address")
        self.address = address
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.closing = False
        self.open_jobs: dict[str, RayJob] = {}
        self._numbers = itertools.count(1)
        self._head: Any = None
        self._starting = anyio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._snapshot: dict[str, object] = {"device": "ray", "workers": 0, "ready": 0, "queued": 0, "busy": 0}
        self._loads: tuple[RoleLoad, RoleLoad] | None = None

    async def start(self) -> None:
        """Connect, and wait until the head answers. Raises PoolError when the cluster has no pool."""
        async with self._starting:
            if self._head is not None:
                return
            await anyio.to_thread.run_sync(self._connect)
            self._snapshot, self._loads = await self._call("look")
            await self._introduce()
            for work in (self._listen(), self._look()):
                self._spawn(work)

    def _connect(self) -> None:
        if not ray.is_initialized():
            try:
                connect(self.address)
            except (RayError, ConnectionError, RuntimeError, ValueError) as error:
                raise PoolError(f"the pool's address {self.address}: no Ray cluster there: {error}") from None
        self._head = find_head()

    async def check_task(self, task: Task) -> str | None:
        await self.start()
        fault: str | None = await self._call("check_task", task)
        return fault

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
        options: Mapping[str, object] | None = None,
        job: str | None = None,
    ) -> RayJob:
        """As Driver.submit. What the head refuses ends the job with a verdict that says so."""
        if self.closing:
            raise ValueError("the pool is closed")
        order = order_of(
            task, candidate, f"{self.name}/{search}", stage=stage, priority=priority, deadline=deadline, fork=fork,
            could_end=could_end, options=options,
        )  # fmt: skip
        handle = RayJob(pool=self, id=job or f"{self.name}/{next(self._numbers)}", order=order)
        self.open_jobs[handle.id] = handle
        self._spawn(self._send(handle))
        return handle

    async def _send(self, job: RayJob) -> None:
        try:
            await self.start()
            await self._call("open_search", job.order.search)
            await self._call("submit", self.name, job.id, job.order)
        except (PoolError, ValueError, RayError) as error:
            cause = getattr(error, "cause", None) or error
            job.finish(job.failed(Status.CRASH, f"the pool did not take it: {cause}"))
        finally:
            job.sent.set()

    def cancel(self, job: RayJob) -> None:
        if not job.result.done():
            self._spawn(self._cancel(job))

    async def _cancel(self, job: RayJob) -> None:
        await job.sent.wait()
        await self._call("cancel", job.id)

    def cancel_search(self, search: str) -> int:
        """Jobs of it that have no outcome here yet; they end as cancelled once the head has heard of it."""
        jobs = [job for job in self.open_jobs.values() if job.order.search == f"{self.name}/{search}"]
        self._spawn(self._cancel_search(jobs, f"{self.name}/{search}"))
        return len(jobs)

    async def _cancel_search(self, jobs: list[RayJob], search: str) -> None:
        for job in jobs:
            await job.sent.wait()
        await self._call("cancel_search", search)

    def admission(self, wanted: int, remaining_s: float, **fork: float) -> Admission:
        """As Driver.admission, from what the head last said (at most SNAPSHOT_S old); before that all are admitted."""
        if self._loads is None:
            return Admission(wanted, 0.0, "")
        return admit(wanted, remaining_s, *self._loads, **fork)  # type: ignore[arg-type]

    def snapshot(self) -> dict[str, object]:
        """The head's, at most SNAPSHOT_S old."""
        return self._snapshot

    async def close(self) -> None:
        """Cancel this server's jobs; the pool and its other servers go on."""
        if self.closing:
            return
        self.closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in list(self.open_jobs.values()):
            job.finish(job.failed(Status.CANCELLED, "the pool was closed"))
        if self._head is not None:
            try:
                with anyio.move_on_after(CONNECT_S):
                    await self._head.leave.remote(self.name)
            except RayError:
                pass

    # -- the head, which may die and come back -----------------------------------------------------------------------

    async def _call(self, what: str, *arguments: object) -> Any:
        """Ask again while the head is being restarted; all that is asked may be asked twice."""
        stop = time.monotonic() + REACH_S
        while True:
            try:
                return await getattr(self._head, what).remote(*arguments)
            except RayActorError as error:
                if time.monotonic() > stop:
                    raise PoolError(f"the pool's head is gone: {error}") from None
                await anyio.sleep(AGAIN_S)

    async def _introduce(self) -> None:
        """Give the head something that dies with this process, by which it notices."""
        stay = self._head.stay.remote(self.name)
        self._spawn(quietly(stay))  # which keeps it alive
        await self._call("watch", self.name, [stay])

    async def _listen(self) -> None:
        life, had = "", 0
        while not self.closing:
            try:
                said, first, news = await self._call("news", self.name, life, had)
                if said != life:  # its first life, or a new one that knows nobody
                    life, first_time, had = said, not life, 0
                    if not first_time:
                        await self._again()
                        continue
            except (PoolError, RayError) as error:
                for job in list(self.open_jobs.values()):
                    job.finish(job.failed(Status.CRASH, str(error)))
                return
            for number, one in enumerate(news, first):
                if number >= had and one.job in self.open_jobs:
                    self.open_jobs[one.job].hear(one)
            had = max(had, first + len(news))

    async def _again(self) -> None:
        """A head that was restarted, or let this client go: ask what became of what is open, submit what it lacks."""
        await self._introduce()
        sent = [name for name, job in self.open_jobs.items() if job.sent.is_set()]
        for name in await self._call("follow", self.name, sent):
            if name in self.open_jobs:
                self._spawn(self._send(self.open_jobs[name]))

    async def _look(self) -> None:
        while not self.closing:
            self._snapshot, self._loads = await self._call("look")
            await anyio.sleep(SNAPSHOT_S)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def require_answer(address: str, field: str) -> None:
    """Raises PoolError naming field and address unless something listens at HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise PoolError(f"{field} {address}: use HOST:PORT, as the first `specgen evaluator` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise PoolError(
            f"{field} {address}: nothing answers there ({error.strerror or error}); see that the first "
            "`specgen evaluator` runs and that its address is spelt as it printed it"
        ) from None
