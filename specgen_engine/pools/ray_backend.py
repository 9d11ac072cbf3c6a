"""Evaluators on a Ray cluster: one supervisor actor for each unit of the resource that evaluator nodes offer.

A node that joins or leaves needs to tell nobody: the backend looks at the cluster's nodes, and an actor that is lost
takes its slots with it, whatever killed it. Ray is imported here, at the top: import this module only where it is used.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..evaluation.limits import EvaluationLimits
from .base import Done, Event, NoSlot, Reached, SlotDown, SlotUp, Switched, Work
from .local import LocalBackend
from .policy import Role

if TYPE_CHECKING:
    from .lending import LenderLending

log = logging.getLogger(__name__)

GPU_RESOURCE = "specgen_gpu_evaluator"
CPU_RESOURCE = "specgen_cpu_evaluator"
LOOK_S = 0.5
ACTOR_S = 60.0
"""An actor that is not up by then is given up; the next look at the nodes tries again."""


class SupervisorOptions(NamedTuple):
    """workers: processes on one GPU (they compile side by side and take turns on it).

    lend: how much of each GPU's memory (of the host's, on CPU nodes) servers may use for KV pages, as `specgen lend`
    reads it; "" for none.  lend_directory: of the lenders' sockets; None for the usual one.
    """

    limits: EvaluationLimits
    workers: int = 1
    cache: Path | None = None
    lend: str = ""
    lend_directory: Path | None = None


def _lend(device: str, unit: str, options: SupervisorOptions) -> LenderLending:
    from .lending import lend_spare  # the transport is a compiled part that not every evaluator needs

    return lend_spare(device, options.lend, unit, options.lend_directory)


class Supervisor:
    """An actor: the workers of one GPU, or one CPU worker. The role of each slot lives in here."""

    def __init__(self, options: SupervisorOptions, unit: str, gpu: bool) -> None:
        devices = ("cuda:0",) * options.workers if gpu else ("cpu",)  # Ray shows the actor only its own GPU
        self._lending = _lend(devices[0], unit, options) if options.lend else None
        self._backend = LocalBackend(
            devices, limits=options.limits, cache=options.cache, unit=unit, lending=self._lending, build_slots=0
        )
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.roles: dict[int, Role] = {}

    async def open(self) -> int:
        """Returns the process id."""
        self._backend.open(self._events.put_nowait)
        return os.getpid()

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until something has."""
        out = [await self._events.get()]
        while not self._events.empty():
            out.append(self._events.get_nowait())
        return out

    async def run(self, slot: int, work: Work) -> None:
        if slot in self._backend.workers:
            self._backend.run(slot, work)

    async def switch(self, slot: int, role: Role) -> None:
        self.roles[slot] = role
        self._backend.switch(slot, role)

    async def expect(self, starts_per_s: float) -> None:
        self._backend.expect(starts_per_s)

    async def cancel(self, slot: int, job: str) -> None:
        self._backend.cancel(slot, job)

    async def kill(self, slot: int) -> None:
        self._backend.kill(slot)

    async def close(self) -> None:
        await self._backend.close()
        if self._lending is not None:
            await anyio.to_thread.run_sync(self._lending.close)


class _Unit:
    """A supervisor actor as the backend knows it."""

    def __init__(self, node: str, unit: str, actor: Any) -> None:
        self.node, self.unit, self.actor = node, unit, actor
        self.pid = 0
        self.slots: dict[int, int] = {}  # the actor's number: the pool's


class RayBackend:
    """See base.Backend. Ray is connected already; nodes count that offer GPU_RESOURCE or CPU_RESOURCE."""

    def __init__(self, options: SupervisorOptions) -> None:
        self.options = options
        self.closing = False
        self.tell: Callable[[Event], None] = lambda event: None
        self.units: dict[tuple[str, str], _Unit] = {}
        self.restarts = 0
        self._places: dict[int, tuple[_Unit, int]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell
        self._spawn(self._watch())

    async def _watch(self) -> None:
        """Look for nodes that have come; those that have gone are noticed by their actors' silence."""
        while not self.closing:
            try:
                for node in await anyio.to_thread.run_sync(ray.nodes):
                    self._take_up(node)
            except RayError as error:
                log.warning("pool: the cluster does not answer: %s", error)
            await anyio.sleep(LOOK_S)

    def _take_up(self, node: dict[str, Any]) -> None:
        if not node["Alive"]:
            return
        host = f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"
        for resource, kind in ((GPU_RESOURCE, "gpu"), (CPU_RESOURCE, "cpu")):
            for index in range(int(node["Resources"].get(resource, 0))):
                key = node["NodeID"], f"{host}/{kind}{index}"
                if key not in self.units:
                    self._start(node["NodeID"], key[1], resource)

    def _start(self, node: str, unit: str, resource: str) -> None:
        on_gpu = resource == GPU_RESOURCE
        actor = (
            ray.remote(Supervisor)
            .options(
                num_cpus=0,
                num_gpus=1 if on_gpu else 0,
                resources={resource: 1},
                max_restarts=0,
                max_concurrency=64,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self.options, unit, on_gpu)
        )
        one = self.units[node, unit] = _Unit(node, unit, actor)
        self._spawn(self._follow(one))

    async def _follow(self, unit: _Unit) -> None:
        """Pass on what a supervisor says until it is lost."""
        why = "it left"
        try:
            with anyio.fail_after(ACTOR_S):
                unit.pid = await unit.actor.open.remote()
            while not self.closing:
                for event in await unit.actor.events.remote():
                    self._pass_on(unit, event)
        except (RayError, TimeoutError, asyncio.CancelledError) as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
            if self.closing:
                return
        self._lose(unit, why)

    def _pass_on(self, unit: _Unit, event: Event) -> None:
        if isinstance(event, NoSlot):
            log.error("pool: no worker starts on %s: %s", unit.unit, event.why)
            if not self._places:
                self.tell(event)
        elif isinstance(event, SlotUp):
            number = unit.slots[event.slot] = next(self._numbers)
            self._places[number] = unit, event.slot
            self.tell(event._replace(slot=number))
        elif isinstance(event, (SlotDown, Reached, Done, Switched)) and event.slot in unit.slots:
            number = unit.slots[event.slot]
            if isinstance(event, SlotDown):
                self.restarts += 1
                del unit.slots[event.slot], self._places[number]
            self.tell(event._replace(slot=number))

    def _lose(self, unit: _Unit, why: str) -> None:
        """An actor or its node is gone, or does not answer: then it is ended, so that it holds no GPU."""
        log.warning("pool: supervisor %s is lost: %s", unit.unit, why)
        self.units.pop((unit.node, unit.unit), None)
        ray.kill(unit.actor, no_restart=True)
        for number in unit.slots.values():
            self.restarts += 1
            del self._places[number]
            self.tell(SlotDown(number, f"supervisor {unit.unit} is lost: {why}"))

    # -- what the pool asks ------------------------------------------------------------------------------------------

    def run(self, slot: int, work: Work) -> None:
        self._ask(slot, "run", work)

    def switch(self, slot: int, role: Role) -> None:
        self._ask(slot, "switch", role)

    def cancel(self, slot: int, job: str) -> None:
        self._ask(slot, "cancel", job)

    def kill(self, slot: int) -> None:
        self._ask(slot, "kill")

    def _ask(self, slot: int, what: str, *more: object) -> None:
        """Calls to one actor arrive in order; a slot that is gone has said or will say so."""
        if slot in self._places:
            unit, local = self._places[slot]
            getattr(unit.actor, what).remote(local, *more)

    def expect(self, starts_per_s: float) -> None:
        """Each supervisor hears of its share."""
        if self.options.lend:
            for unit in self.units.values():
                unit.actor.expect.remote(starts_per_s / len(self.units))

    def describe(self) -> dict[str, object]:
        return {"device": "ray", "workers": len(self._places), "restarts": self.restarts, "units": len(self.units)}

    async def close(self) -> None:
        self.closing = True
        units = list(self.units.values())
        closing = [asyncio.ensure_future(quietly(unit.actor.close.remote())) for unit in units]
        if closing:
            await asyncio.wait(closing, timeout=10)
        for unit in units:
            ray.kill(unit.actor, no_restart=True)
        for task in [*self._tasks, *closing]:
            task.cancel()
        await asyncio.gather(*self._tasks, *closing, return_exceptions=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def quietly(reference: Any) -> None:
    try:
        await reference
    except RayError:
        pass
