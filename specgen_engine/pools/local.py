"""A pool of worker processes on this machine, driven from one asyncio event loop (uvloop too)."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from ..evaluation.base import Candidate, Stage, Status, Task, Verdict
from ..evaluation.limits import EvaluationLimits

START_S = 180.0
GRACE_S = 6.0
LINE_BYTES = 16 << 20


def default_cache() -> Path:
    """SPECGEN_CACHE/builds, else ~/.cache/specgen/builds."""
    return Path(os.environ.get("SPECGEN_CACHE") or Path.home() / ".cache" / "specgen") / "builds"


@dataclass(eq=False)
class LocalJob:
    """See Job. Ordered by priority (higher first), then by age."""

    sort_key: tuple[float, int]
    id: str
    task: Task
    candidate: Candidate | None
    search: str
    deadline: float | None
    device: str
    submitted: float = field(default_factory=time.monotonic)
    seen: list[Stage] = field(default_factory=lambda: [Stage.QUEUED])
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    slot: _Slot | None = field(default=None)
    tries: int = field(default=0)
    queued_s: float = field(default=0.0)

    def __lt__(self, other: LocalJob) -> bool:
        return self.sort_key < other.sort_key

    async def events(self) -> AsyncIterator[Stage]:
        index = 0
        while True:
            while index < len(self.seen):
                yield self.seen[index]
                index += 1
            if self.result.done():
                return
            self.changed.clear()
            await self.changed.wait()

    async def verdict(self) -> Verdict:
        return await asyncio.shield(self.result)

    def cancel(self) -> None:
        """Queued: it ends now. Running: its processes are killed, the verdict follows within 200 ms."""
        if self.result.done():
            return
        if self.slot is None:
            self.end(Status.CANCELLED, "cancelled")
        else:
            self.slot.send({"op": "cancel", "job": self.id})

    def advance(self, stage: Stage) -> None:
        self.seen.append(stage)
        self.changed.set()

    def end(self, status: Status, reason: str) -> None:
        assert self.candidate is not None
        self.finish(Verdict(self.candidate.hash, status, reason, device=self.device, stages=self.waited()))

    def waited(self) -> dict[str, float]:
        return {Stage.QUEUED: round(self.queued_s or time.monotonic() - self.submitted, 4)}

    def finish(self, value: object) -> None:
        if not self.result.done():
            self.result.set_result(value)
        self.changed.set()


class _Slot:
    """One worker process and the job that it runs."""

    def __init__(self, pool: LocalPool, number: int) -> None:
        self.pool, self.number = pool, number
        self.job: LocalJob | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.ready = asyncio.Event()
        self.sandbox = ""
        self.task = ""  # the hash of the one whose reference it has at hand
        self.restarts = 0
        self.fault = ""

    async def run(self) -> None:
        """Keep a worker alive until the pool closes."""
        while not self.pool.closing:
            started = time.monotonic()
            await self._life()
            self.ready.clear()
            self.task = ""
            lost, self.job = self.job, None
            if lost is not None:
                self.pool.retry(lost)
            if self.pool.closing:
                return
            self.restarts += 1
            self.fault = f"worker {self.number} ended with code {self.process.returncode if self.process else None}"
            if time.monotonic() - started < 5.0:
                self.pool.start_failed(self)
                await anyio.sleep(min(10.0, 0.5 * self.restarts))

    async def _life(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            self.process = await anyio.to_thread.run_sync(self._spawn, theirs)
        finally:
            theirs.close()
        reader, self.writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except (ConnectionError, ValueError):
            pass
        finally:
            self.writer.close()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_bury, self.process, self.scratch)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        self.scratch = Path(tempfile.mkdtemp(prefix="specgen-worker-"))
        limits = json.dumps(self.pool.limits.to_dict())
        command = [
            sys.executable,
            "-m",
            "specgen_engine.evaluation.worker_main",
            str(theirs.fileno()),
            self.pool.device,
        ]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        return subprocess.Popen(
            [*command, str(self.pool.cache), str(self.scratch), limits],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.pool.log,
            env={**os.environ, **threads, "PYTHONPATH": _import_path()},
            start_new_session=True,
        )

    def _take(self, message: dict) -> None:
        job = self.job
        if "ready" in message:
            self.sandbox = message["sandbox"]
            self.restarts = 0
            self.ready.set()
            self.pool.dispatch()
        elif "fatal" in message:
            self.pool.give_up(message["fatal"])
        elif job is None or message.get("job") != job.id:
            return
        elif "stage" in message:
            job.advance(Stage(message["stage"]))
        else:
            self.job = None
            if "verdict" in message:
                job.finish(_verdict(message["verdict"], job.waited()))
            else:
                job.finish(message["task"])
            self.pool.dispatch()

    def send(self, message: dict[str, object]) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")

    def give(self, job: LocalJob) -> None:
        self.job, job.slot, self.task = job, self, job.task.hash
        job.queued_s = time.monotonic() - job.submitted
        task = {"source": job.task.source, "name": job.task.name}
        message: dict[str, object] = {"op": "check_task", "job": job.id, "task": task}
        if job.candidate is not None:
            message |= {"op": "evaluate", "candidate": job.candidate.source}
        self.send(message)


class LocalPool:
    """See Pool. Workers start in the background once start() runs; each holds torch, about 0.4 GB, and two processes.

    device: 'cpu' or 'cuda:N'. log: a file descriptor or file for what workers print (default: this process's stderr).
    Raises ValueError naming the field when workers or device is out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        device: str = "cpu",
        limits: EvaluationLimits | None = None,
        cache: Path | None = None,
        log: int | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: use at least 1")
        if device != "cpu" and not device.startswith("cuda"):
            raise ValueError(f"device={device!r}: use cpu or cuda:N")
        self.device, self.limits, self.log = device, limits or EvaluationLimits(), log
        self.cache = cache or default_cache()
        self.closing = False
        self._slots = [_Slot(self, number) for number in range(workers)]
        self._queue: list[LocalJob] = []
        self._tasks: list[asyncio.Task] = []
        self._numbers = itertools.count(1)
        self._done: dict[str, int] = {}
        self._hopeless = asyncio.Event()
        self.fault = ""

    async def start(self) -> None:
        """Start every worker and wait for the first to be ready. Raises RuntimeError when none comes up."""
        self.start_soon()
        first = [asyncio.ensure_future(slot.ready.wait()) for slot in self._slots]
        first.append(asyncio.ensure_future(self._hopeless.wait()))
        _, waiting = await asyncio.wait(first, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not any(slot.ready.is_set() for slot in self._slots):
            await self.close()
            raise RuntimeError(f"no evaluation worker starts: {self.fault or f'none is ready after {START_S:g} s'}")

    def start_soon(self) -> None:
        """Start workers without waiting; jobs may be submitted at once."""
        if not self._tasks:
            self._tasks = [asyncio.get_running_loop().create_task(slot.run()) for slot in self._slots]

    async def check_task(self, task: Task) -> str | None:
        """Runs the reference in a worker; None when usable, else one line."""
        job = self._enqueue(task, None, "", float("inf"), None)
        return await asyncio.shield(job.result)

    def submit(
        self, task: Task, candidate: Candidate, *, search: str, priority: float = 0.0, deadline: float | None = None
    ) -> LocalJob:
        """Queue one evaluation. deadline is a time.monotonic() value; raises ValueError when it has passed."""
        if self.closing:
            raise ValueError("the pool is closed")
        if deadline is not None and deadline <= time.monotonic():
            raise ValueError(f"deadline={deadline}: it has passed")
        return self._enqueue(task, candidate, search, priority, deadline)

    def _enqueue(
        self, task: Task, candidate: Candidate | None, search: str, priority: float, deadline: float | None
    ) -> LocalJob:
        number = next(self._numbers)
        job = LocalJob((-priority, number), f"job-{number}", task, candidate, search, deadline, self.device)
        job.result.add_done_callback(lambda _: self._count(job))
        if deadline is not None:
            timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), self._expire, job)
            job.result.add_done_callback(lambda _: timer.cancel())
        heapq.heappush(self._queue, job)
        self.dispatch()
        return job

    def _expire(self, job: LocalJob) -> None:
        if job.slot is None:
            job.end(Status.TIMEOUT, "its deadline passed while it waited")
        else:
            job.cancel()

    def _count(self, job: LocalJob) -> None:
        if job.candidate is not None and not job.result.cancelled():
            status = str(job.result.result().status)
            self._done[status] = self._done.get(status, 0) + 1

    def dispatch(self) -> None:
        """Give waiting jobs to idle workers: one that has the task's reference at hand first."""
        while self._queue:
            if self._queue[0].result.done():
                heapq.heappop(self._queue)
                continue
            idle = [slot for slot in self._slots if slot.ready.is_set() and slot.job is None]
            if not idle:
                return
            job = heapq.heappop(self._queue)
            next((slot for slot in idle if slot.task == job.task.hash), idle[0]).give(job)

    def retry(self, job: LocalJob) -> None:
        """The worker of a job died under it: once more, then it is a crash."""
        job.slot = None
        job.tries += 1
        if job.candidate is None:
            job.finish("the worker that ran the reference was killed")
        elif job.tries < 2 and not self.closing:
            heapq.heappush(self._queue, job)
        else:
            job.end(Status.CANCELLED if self.closing else Status.CRASH, "its worker was killed under it")

    def start_failed(self, slot: _Slot) -> None:
        """A worker died at once. When none lives, nobody may wait for them for ever."""
        if slot.restarts >= 3 and not any(other.ready.is_set() for other in self._slots):
            self.give_up(slot.fault)

    def give_up(self, fault: str) -> None:
        """No worker can start: end what waits, start() raises."""
        self.fault = fault
        self._hopeless.set()
        while self._queue:
            job = heapq.heappop(self._queue)
            if job.candidate is None:
                job.finish(f"no evaluation worker starts: {fault}")
            else:
                job.end(Status.CRASH, f"no evaluation worker starts: {fault}")

    def cancel_search(self, search: str) -> int:
        """Cancel queued and running jobs of a search; returns how many."""
        running = [slot.job for slot in self._slots if slot.job is not None]
        jobs = [job for job in [*self._queue, *running] if job.search == search and not job.result.done()]
        for job in jobs:
            job.cancel()
        return len(jobs)

    def snapshot(self) -> dict[str, object]:
        waiting = [job for job in self._queue if not job.result.done()]
        return {
            "device": self.device,
            "workers": len(self._slots),
            "ready": sum(slot.ready.is_set() for slot in self._slots),
            "busy": sum(slot.job is not None for slot in self._slots),
            "queued": len(waiting),
            "finished": dict(self._done),
            "sandbox": next((slot.sandbox for slot in self._slots if slot.sandbox), ""),
            "restarts": sum(slot.restarts for slot in self._slots),
        }

    async def close(self) -> None:
        """Cancel every job, end every worker and what it started; returns when they are gone."""
        self.closing = True
        while self._queue:
            job = heapq.heappop(self._queue)
            if job.candidate is not None:
                job.end(Status.CANCELLED, "the pool was closed")
            else:
                job.finish("the pool was closed")
        for slot in self._slots:
            if slot.writer is not None:
                slot.writer.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S + 2)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self._slots:
            if slot.job is not None:
                self.retry(slot.job)
                slot.job = None


def _bury(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """Let a worker whose socket is closed kill what it started; then make sure that it is gone."""
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(scratch, ignore_errors=True)


def _verdict(message: dict, waited: dict[str, float]) -> Verdict:
    interval = message.pop("interval", None)
    status = Status(message.pop("status"))
    stages = waited | message.pop("stages")
    stages[Stage.QUEUED] = round(stages[Stage.QUEUED] + message.pop("waited", 0.0), 4)
    return Verdict(status=status, interval=tuple(interval) if interval else None, stages=stages, **message)


def _import_path() -> str:
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
