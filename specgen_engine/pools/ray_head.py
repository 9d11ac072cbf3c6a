"""The pool of a Ray cluster: one named actor holds policy, journal and account for every server that submits to it.

It is restarted when it dies; its journal says what was open. A client is told what became of its jobs in batches, from
the last that it has seen on, so that neither a lost message nor a restart hides an outcome or shows one twice.

A client whose process dies is let go within seconds: it owns a reference that dies with it. One whose host is lost, or
that died before this life of the head, is let go once it has been silent for GONE_S. A server that is started again is
a new client: the requests of the old one ended with it, and nobody waits for their jobs.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import ray
from ray.exceptions import OwnerDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import SpecGenError
from ..evaluation.base import Stage, Task
from .driver import Driver
from .job import Order, PoolJob, outcome_text
from .journal import Journal
from .metrics import exposition
from .policy import RoleLoad
from .ray_backend import RayBackend, SupervisorOptions

NAMESPACE = "specgen"
HEAD = "specgen-pool"
HOLD_S = 20.0
"""How long a client's question for news is held open without any."""
GONE_S = 60.0
"""A client that has asked for nothing so long is taken for dead."""
LOOK_S = 5.0
"""How often the head looks for such clients."""
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
ANSWER_S = 5.0
FORGET_S = 7 * 86_400.0


class PoolError(SpecGenError):
    """A shared pool that cannot be reached or started; nothing was changed."""


class News(NamedTuple):
    """stage: reached by a job.  outcome: its end, as the journal keeps it.  Exactly one of them is set."""

    job: str
    stage: Stage | None
    outcome: str | None


class _Client:
    """What one client has still to be told. first: number of the first piece of news kept.

    life: another one for a client that was let go and comes back, which asks then what became of its jobs.
    """

    def __init__(self, life: str) -> None:
        self.life = life
        self.gone = anyio.Event()
        self.first = 0
        self.news: list[News] = []
        self.more = anyio.Event()
        self.followed: set[str] = set()
        self.asked = time.monotonic()

    def add(self, news: News) -> None:
        self.news.append(news)
        self.more.set()
        self.more = anyio.Event()


class PoolHead:
    """The actor. Searches are named as clients name them; a client puts its own name before."""

    def __init__(self, journal: Path | None, options: SupervisorOptions) -> None:
        self._journal, self._options = journal, options
        self._driver: Driver | None = None
        self._clients: dict[str, _Client] = {}
        self._lives = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Open the journal, take up what an earlier life left; returns who this life is. Raises JournalError."""
        return self._pool().life

    def _pool(self) -> Driver:
        if self._driver is None:
            journal = Journal(self._journal) if self._journal else None
            if journal is not None:
                journal.forget(FORGET_S)
            driver = Driver(RayBackend(self._options), journal=journal, strict=True)
            driver.resume(retry=True)
            driver.start_soon()
            self._driver = driver
            for search in driver.ledger.searches:
                self._client(_owner(search))
            self._spawn(self._let_go())
        return self._driver

    def _client(self, name: str) -> _Client:
        pool = self._pool()
        if name not in self._clients:
            self._clients[name] = _Client(f"{pool.life}/{next(self._lives)}")
        return self._clients[name]

    async def open_search(self, search: str, weight: float = 1.0) -> None:
        self._client(_owner(search))
        known = self._pool().ledger.searches.get(search)
        if known is None or known.ended:
            self._pool().open_search(search, weight)

    async def submit(self, client: str, job: str, order: Order) -> None:
        """Raises ValueError as Driver.submit does. A job that is here already is followed, not submitted again."""
        pool = self._pool()
        if job not in pool.ledger.jobs and pool.ledger.journal.entry(job) is None:
            deadline = None if order.deadline is None else time.monotonic() + order.deadline - time.time()
            assert order.candidate is not None
            pool.submit(
                order.task, order.candidate, search=order.search, priority=order.priority, deadline=deadline,
                stage=order.stage, fork=order.fork, could_end=order.could_end, job=job, options=order.options,
            )  # fmt: skip
        await self.follow(client, [job])

    async def follow(self, client: str, jobs: list[str]) -> list[str]:
        """Tell the client of these jobs from now on; returns those that nobody knows here."""
        pool, one = self._pool(), self._client(client)
        unknown = []
        for name in jobs:
            if name in one.followed:
                continue
            live, entry = pool.ledger.jobs.get(name), pool.ledger.journal.entry(name)
            if live is not None:
                self._spawn(self._follow(one, live))
            elif entry is not None and entry.outcome is not None:
                one.add(News(name, None, entry.outcome))
            else:
                unknown.append(name)
                continue
            one.followed.add(name)
        return unknown

    async def _follow(self, client: _Client, job: PoolJob) -> None:
        async for stage in job.events():
            client.add(News(job.id, stage, None))
        client.add(News(job.id, None, outcome_text(await job.outcome())))

    async def news(self, client: str, life: str, after: int) -> tuple[str, int, list[News]]:
        """(this life, number of the first, news). life, after: which life the client knows, how much it had of it."""
        one = self._client(client)
        one.asked = time.monotonic()
        if life != one.life:
            return one.life, one.first, list(one.news)
        del one.news[: max(0, after - one.first)]
        one.first = max(one.first, after)
        if not one.news:
            with anyio.move_on_after(HOLD_S):
                await one.more.wait()
        return one.life, one.first, list(one.news)

    async def cancel(self, job: str) -> None:
        live = self._pool().ledger.jobs.get(job)
        if live is not None:
            live.cancel()

    async def cancel_search(self, search: str) -> int:
        return self._pool().cancel_search(search)

    async def stay(self, client: str) -> None:
        """Runs until the client is let go: its reference to this call is what watch() is given."""
        await self._client(client).gone.wait()

    async def watch(self, client: str, stays: list[Any]) -> None:
        """Let the client go when its process dies. stays: its reference to stay(); Ray waits for it outside a list."""
        self._spawn(self._watch(client, self._client(client), stays[0]))

    async def _watch(self, name: str, client: _Client, stay: Any) -> None:
        try:
            await stay
        except OwnerDiedError:
            if self._clients.get(name) is client:
                await self.leave(name, "the server that asked for it has died")
        except RayError:
            pass

    async def leave(self, client: str, why: str = "cancelled") -> None:
        """A client that closes in order, or has died: its jobs end, its news are dropped."""
        pool = self._pool()
        for search in [name for name in pool.ledger.searches if _owner(name) == client]:
            pool.cancel_search(search, why)
        one = self._clients.pop(client, None)
        if one is not None:
            one.gone.set()

    async def _let_go(self) -> None:
        """Clients that ask for nothing any more have died: nobody waits for their jobs."""
        while True:
            await anyio.sleep(LOOK_S)
            for name, client in list(self._clients.items()):
                silent_s = time.monotonic() - client.asked
                if silent_s > GONE_S:
                    await self.leave(name, f"the server that asked for it has been silent for {silent_s:.0f} s")

    async def check_task(self, task: Task) -> str | None:
        return await self._pool().check_task(task)

    async def look(self) -> tuple[dict[str, object], tuple[RoleLoad, RoleLoad] | None]:
        """(snapshot, what a client decides admission from)."""
        return await self.snapshot(), self._pool().loads()

    async def snapshot(self) -> dict[str, object]:
        pool = self._pool()
        units = {f"{node[:6]}/{unit}": one.pid for (node, unit), one in pool.backend.units.items()}  # type: ignore[attr-defined]
        return {**pool.snapshot(), "clients": len(self._clients), "pid": os.getpid(), "supervisors": units}

    async def metrics(self) -> bytes:
        """Prometheus' text format."""
        return exposition(self._pool().ledger.account, time.monotonic())

    async def close(self) -> None:
        if self._driver is not None:
            await self._driver.close()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _owner(search: str) -> str:
    """The client that named it."""
    return search.partition("/")[0]


def start_head(journal: Path | None, options: SupervisorOptions) -> Any:
    """The cluster's pool: the one that is there, or a new one on this node. Raises PoolError when it can't start."""
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=True)
    head = (
        ray.remote(PoolHead)
        .options(
            name=HEAD, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1,
            max_task_retries=0, max_concurrency=512, scheduling_strategy=here,
        )
        .remote(journal, options)
    )  # fmt: skip
    try:
        ray.get(head.start.remote(), timeout=60)
    except RayError as error:
        cause = error.cause if hasattr(error, "cause") else error
        ray.kill(head, no_restart=True)
        raise PoolError(f"the pool does not start: {cause}") from None
    return head


def connect(address: str | None) -> None:
    """Join the cluster at HOST:PORT (None: the one at hand) as a client, with this user's Ray token if it asks for one.

    From Ray 2.60 on `ray start` asks everyone for ~/.ray/auth_token when that exists, as it does once a local cluster
    has run; ray.init sends it to a cluster that it finds by itself, but not to one that is named. A client that asked
    for tokens in a cluster without would not be reached by the others: its death was noticed after a minute only.
    Raises what ray.init does.
    """
    if address is not None and asks_for_token(address):
        try:
            from ray._private.authentication import authentication_token_setup as tokens

            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        except (ImportError, AttributeError, TypeError):
            pass  # another release, with other rules: ray.init follows them
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")


def asks_for_token(address: str) -> bool:
    """Whether the cluster refuses a question without Ray's token. False where grpcio, of ray's default extra, lacks."""
    try:
        import grpc
    except ImportError:
        return False
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CLUSTER_ID)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def find_head() -> Any:
    """Raises PoolError when the cluster has no pool."""
    try:
        return ray.get_actor(HEAD, namespace=NAMESPACE)
    except ValueError:
        raise PoolError(
            "the Ray cluster has no evaluator pool; start one there with: specgen evaluator --gpus LIST"
        ) from None
