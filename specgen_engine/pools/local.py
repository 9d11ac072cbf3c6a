"""Worker processes on this machine, driven from one asyncio event loop (uvloop too): the local backend and its pool."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import anyio
import anyio.to_thread

from ..evaluation.base import Stage
from ..evaluation.limits import EvaluationLimits
from .base import Done, Event, Lending, NoSlot, Reached, SlotDown, SlotUp, Switched, Work
from .driver import Driver
from .journal import Journal
from .local_builder import BuilderProcess
from .local_process import GRACE_S, LINE_BYTES, bury, read_messages, start_process
from .policy import PolicyConfig, Role
from .policy_builds import builds_at_once

log = logging.getLogger(__name__)

TIMING_LEASE_S = 30.0
ROOM_BYTES = 4 << 30
"""Of a GPU's memory, that an evaluation finds free when it starts, where memory is lent."""
QUICK_S = 5.0
"""A worker that ends sooner after its start counts as one that cannot start."""


def default_cache() -> Path:
    """SPECGEN_CACHE/builds, else ~/.cache/specgen/builds."""
    return Path(os.environ.get("SPECGEN_CACHE") or Path.home() / ".cache" / "specgen") / "builds"


class WorkerProcess:
    """One worker process after another at one place of a device; each is a slot of its own to the pool."""

    def __init__(self, backend: LocalBackend, device: str, unit: str) -> None:
        self.backend, self.device, self.unit = backend, device, unit
        self.slot: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.work: Work | None = None
        self.lease: _Lease | None = None
        self.restarts = self.failures = 0  # ever; in a row
        self.fault = ""
        self._kept: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Keep a worker alive until the backend closes."""
        while not self.backend.closing:
            started = time.monotonic()
            await self._life()
            self.fault = f"worker {self.unit} ended with code {self.process.returncode if self.process else None}"
            slot, self.slot, self.work = self.slot, None, None
            self._end_lease()
            if self.backend.closing:
                return
            self.restarts += 1
            self.failures += 1
            if slot is not None:
                del self.backend.workers[slot]
                self.backend.tell(SlotDown(slot, self.fault))
            if time.monotonic() - started < QUICK_S:
                self.backend.start_failed(self)
                await anyio.sleep(min(10.0, 0.5 * self.failures))

    async def _life(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            self.process = await anyio.to_thread.run_sync(self._spawn, theirs)
        finally:
            theirs.close()
        reader, self.writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        try:
            await read_messages(reader, self._take)
        finally:
            self.writer.close()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(bury, self.process, self.scratch)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        backend = self.backend
        process, self.scratch = start_process(theirs, self.device, backend.cache, backend.limits, backend.log)
        return process

    def _take(self, message: dict) -> None:
        tell, work = self.backend.tell, self.work
        if "ready" in message:
            self.failures = 0
            self.slot = next(self.backend.numbers)
            self.backend.workers[self.slot] = self
            tell(SlotUp(self.slot, self.unit, self.device, message["sandbox"]))
        elif "fatal" in message:
            tell(NoSlot(message["fatal"]))
        elif work is None or self.slot is None or message.get("job") != work.job:
            return
        elif "stage" in message:
            tell(Reached(self.slot, work.job, work.attempt, Stage(message["stage"])))
        elif "asks" in message:
            if self.backend.lending is not None:
                self._keep(self._grant_quiet(self.backend.lending, work))
        else:
            self.work = None
            self._end_lease()
            tell(Done(self.slot, work.job, work.attempt, message))

    def give(self, work: Work) -> None:
        self.work = work
        lending = self.backend.lending
        if lending is None or not lending.lends(self.device):
            self.send(work.message())
        else:
            self._keep(self._give_on_lent_device(lending, work))

    async def _give_on_lent_device(self, lending: Lending, work: Work) -> None:
        """Its memory first, then the work, which asks for quiet once it has the device to itself."""
        try:
            await anyio.to_thread.run_sync(lending.make_room, self.device, self.backend.room_bytes)
        except Exception:  # whatever ails the tier, the job runs: it may find enough
            log.exception("asking lent memory of %s back", self.device)
        if self.work is work:
            self.send(work.message() | {"lent": True})

    async def _grant_quiet(self, lending: Lending, work: Work) -> None:
        """Hold the lease until the work's last message, and tell the worker that it may begin."""
        reached = False
        lease = self.lease = self.lease or _Lease(lending.quiet(self.device, work.quiet_s or TIMING_LEASE_S))
        try:
            reached = await lease.begin()
        except Exception:  # the worker notes that it was not quiet
            log.exception("keeping KV copies off %s", self.device)
        if self.work is work:
            self.send({"op": "quiet", "job": work.job, "reached": reached})

    def _end_lease(self) -> None:
        if self.lease is not None:
            self._keep(self.lease.end())
        self.lease = None

    def _keep(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)

    def send(self, message: dict[str, object]) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")


class _Lease:
    """A quiet lease, entered and left on threads, once each."""

    def __init__(self, held: AbstractContextManager[bool]) -> None:
        self._held = held
        self._lock = anyio.Lock()
        self._inside = self._over = self._reached = False

    async def begin(self) -> bool:
        """Whether copies had drained; asked again, the same."""
        async with self._lock:
            if not (self._over or self._inside):
                self._reached = await anyio.to_thread.run_sync(self._held.__enter__)
                self._inside = True
            return self._reached and not self._over

    async def end(self) -> None:
        async with self._lock:
            self._over = True
            if self._inside:
                self._inside = False
                await anyio.to_thread.run_sync(self._held.__exit__, None, None, None)


class LocalBackend:
    """See base.Backend. devices: one entry a worker ('cpu' or 'cuda:N'; a GPU may be named several times).

    unit: the name that their time is accounted to (default: the device's).
    lending: see base.Lending; room_bytes: what it is asked to make free.
    build_slots: C++ builds at once beside the workers (base.Builds), 0: workers build; default: as this host's cores
        carry.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        limits: EvaluationLimits | None = None,
        cache: Path | None = None,
        log: int | None = None,
        lending: Lending | None = None,
        room_bytes: int = ROOM_BYTES,
        unit: str = "",
        build_slots: int | None = None,
    ) -> None:
        for device in devices:
            name, _, number = device.partition(":")
            if device != "cpu" and (name != "cuda" or not (number or "0").isdigit()):
                raise ValueError(f"device={device!r}: use cpu or cuda:N")
            if name == "cuda" and int(number or 0) >= (gpus := visible_gpus()):
                raise ValueError(f"device={device!r}: there are {gpus} GPUs here; use a lower number")
        self.limits, self.cache, self.log = limits or EvaluationLimits(), cache or default_cache(), log
        self.lending, self.room_bytes = lending, room_bytes
        self.closing = False
        self.workers: dict[int, WorkerProcess] = {}
        self.numbers = itertools.count()
        self.places = [
            WorkerProcess(self, device, unit or (f"cpu/{index}" if device == "cpu" else device))
            for index, device in enumerate(devices)
        ]
        cores = len(os.sched_getaffinity(0))
        self.build_slots = builds_at_once(cores) if build_slots is None else build_slots
        self.builder = BuilderProcess(self)
        self.tell: Callable[[Event], None] = lambda event: None
        self._tasks: list[asyncio.Task[None]] = []
        self._ahead: asyncio.Task[None] | None = None

    def open(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell
        self._tasks = [asyncio.get_running_loop().create_task(place.run()) for place in self.places]
        if self.build_slots and self.places[0].device != "cpu":
            self.builder.start()  # else with the first build

    def build(self, work: Work) -> None:
        self.builder.build(work)

    def cancel_build(self, job: str) -> None:
        self.builder.cancel(job)

    def run(self, slot: int, work: Work) -> None:
        if slot in self.workers:
            self.workers[slot].give(work)

    def switch(self, slot: int, role: Role) -> None:
        """A worker takes any job; what changes is which ones come."""
        asyncio.get_running_loop().call_soon(lambda: self.tell(Switched(slot)))

    def cancel(self, slot: int, job: str) -> None:
        if slot in self.workers:
            self.workers[slot].send({"op": "cancel", "job": job})

    def kill(self, slot: int) -> None:
        worker = self.workers.get(slot)
        if worker is not None and worker.process is not None:
            worker.process.kill()

    def expect(self, starts_per_s: float) -> None:
        """One question at a time: while the lenders are asked, what comes is heard of again soon enough."""
        if self.lending is not None and not self.closing and (self._ahead is None or self._ahead.done()):
            self._ahead = asyncio.ensure_future(self._make_room_ahead(self.lending, starts_per_s))

    async def _make_room_ahead(self, lending: Lending, starts_per_s: float) -> None:
        try:
            await anyio.to_thread.run_sync(lending.make_room_ahead, starts_per_s, self.room_bytes)
        except Exception:  # each job asks again when it starts
            log.exception("asking lent memory back ahead of jobs")

    def describe(self) -> dict[str, object]:
        devices = list(dict.fromkeys(place.device for place in self.places))
        return {
            "device": ",".join(devices),
            "workers": len(self.places),
            "restarts": sum(place.restarts for place in self.places),
        }

    def start_failed(self, place: WorkerProcess) -> None:
        """A worker died at once. When none lives, nobody may wait for them for ever."""
        if place.failures >= 3 and not any(other.slot is not None for other in self.places):
            self.tell(NoSlot(place.fault))

    async def close(self) -> None:
        self.closing = True
        for writer in (*(place.writer for place in self.places), self.builder.writer):
            if writer is not None:
                writer.close()
        self._tasks += self.builder.tasks
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_S + 2)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *filter(None, [self._ahead]), return_exceptions=True)
        for place in self.places:
            place.work = None
            place._end_lease()


class LocalPool(Driver):
    """See Pool. Workers start in the background once start() runs; each holds torch, about 0.4 GB, and two processes.

    device: 'cpu' or 'cuda:N', or several with commas between, each for `workers` workers.  devices: one entry a worker.
    log: a file descriptor or file for what workers print (default: this process's stderr).
    Raises ValueError naming the field when workers or device is out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        device: str = "cpu",
        devices: Sequence[str] = (),
        limits: EvaluationLimits | None = None,
        cache: Path | None = None,
        log: int | None = None,
        lending: Lending | None = None,
        journal: Journal | None = None,
        config: PolicyConfig | None = None,
        build_slots: int | None = None,
        **driver: object,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: use at least 1")
        backend = LocalBackend(
            tuple(devices) or tuple(device.split(",")) * workers,
            limits=limits, cache=cache, log=log, lending=lending, build_slots=build_slots,
        )  # fmt: skip
        metrics = None
        if "prometheus_client" in sys.modules:  # else nobody reads them here
            from .metrics import process_metrics

            metrics = process_metrics()
        super().__init__(backend, journal=journal, config=config, metrics=metrics, **driver)  # type: ignore[arg-type]
        self.local = backend

    @property
    def _slots(self) -> list[WorkerProcess]:
        return self.local.places


def visible_gpus() -> int:
    """As CUDA will count them; without asking CUDA, since workers fork. Where NVML does not answer: any number."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([one for one in visible.split(",") if one.strip()])
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetCount())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no such package, library or driver
        return 1 << 30
