"""The burst on a Ray cluster of two loopback nodes; workers, supervisors, a node and the head are killed meanwhile.

Then a server is killed and started again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from specgen_engine.evaluation.base import Candidate, Status
from tests.pools.burst import LIMITS, TASK, burst
from tests.pools.ray_server import SLEEP_S, sleeper

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from specgen_engine.pools import ray_head  # noqa: E402
from specgen_engine.pools.base import JobStage  # noqa: E402
from specgen_engine.pools.job import Order  # noqa: E402
from specgen_engine.pools.ray_backend import CPU_RESOURCE, SupervisorOptions  # noqa: E402
from specgen_engine.pools.ray_pool import PoolError, RayPool  # noqa: E402

T = TypeVar("T")
NODE = {"num_cpus": 0, "resources": {CPU_RESOURCE: 1}, "object_store_memory": 80 << 20, "include_dashboard": False}


def start(make: Callable[[], T], tries: int = 3) -> T:
    """Ray gives a node 30 s to come up, which a busy machine may need more than once."""
    for _ in range(tries - 1):
        try:
            return make()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return make()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    one = start(lambda: Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": quick}))
    ray.init(address=one.address, namespace=ray_head.NAMESPACE, log_to_driver=False)
    folder = tmp_path_factory.mktemp("ray-pool")
    ray_head.start_head(folder / "journal.db", SupervisorOptions(LIMITS, cache=folder / "builds"))
    one.journal = folder / "journal.db"
    yield one
    ray.shutdown()
    one.shutdown()


async def when(met: Callable[[], bool], seconds: float = 90.0) -> None:
    stop = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < stop, "it did not happen"
        await asyncio.sleep(0.1)


class Chaos:
    """Kills what a snapshot of the pool names."""

    def __init__(self, cluster: Cluster, pool: RayPool, done: dict[str, Status]) -> None:
        self.cluster, self.pool, self.done = cluster, pool, done
        self.rng = random.Random(3)
        self.kills: Counter[str] = Counter()

    async def some_end(self, low: int, high: int) -> None:
        wanted = len(self.done) + self.rng.randrange(low, high)
        await when(lambda: len(self.done) >= wanted)

    def supervisors(self) -> list[int]:
        return [pid for pid in self.pool.snapshot()["supervisors"].values() if pid and psutil.pid_exists(pid)]

    def kill(self, what: str, pids: list[int]) -> None:
        os.kill(self.rng.choice(pids), signal.SIGKILL)
        self.kills[what] += 1

    async def run(self) -> None:
        await self.some_end(15, 30)
        self.kill("worker", [child.pid for pid in self.supervisors() for child in psutil.Process(pid).children()])
        await self.some_end(15, 30)
        self.kill("supervisor", self.supervisors())
        await self.some_end(10, 20)
        self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)
        self.kills["node"] += 1
        await self.some_end(10, 20)
        start(lambda: self.cluster.add_node(**NODE))
        await self.some_end(10, 20)
        self.kill("head", [self.pool.snapshot()["pid"]])


@pytest.mark.timeout(290)
def test_two_nodes_run_the_burst_whatever_is_killed(cluster: Cluster) -> None:
    asyncio.run(two_nodes(cluster))


async def two_nodes(cluster: Cluster) -> None:
    pool = RayPool(cluster.address)
    await pool.start()
    start(lambda: cluster.add_node(**NODE))
    assert await pool.check_task(TASK) is None
    await when(lambda: pool.snapshot()["ready"] == 2)
    done: dict[str, Status] = {}

    async def follow(job) -> None:
        verdict = await job.verdict()
        assert job.id not in done
        done[job.id] = verdict.status

    jobs = [
        pool.submit(TASK, one.candidate, search=one.search, stage=one.stage, fork=one.fork, job=one.id)
        for one in burst()
    ]
    following = [asyncio.ensure_future(follow(job)) for job in jobs]
    chaos = Chaos(cluster, pool, done)
    await chaos.run()
    await asyncio.gather(*following)
    assert chaos.kills == {"worker": 1, "supervisor": 1, "node": 1, "head": 1}
    check(cluster.journal, done)
    await asyncio.sleep(1.2)
    snapshot = pool.snapshot()
    assert (snapshot["queued"], snapshot["busy"], pool.open_jobs) == (0, 0, {})
    await pool.close()


def check(path: Path, done: dict[str, Status]) -> None:
    from specgen_engine.pools.job import outcome_value
    from specgen_engine.pools.journal import Journal
    from tests.pools.burst import KILLED

    expected = {job.id: job.expected for job in burst()}
    with Journal(path) as journal:
        entries = {name: journal.entry(name) for name in expected}
        counts = journal.counts()
    assert (counts["queued"], counts["running"]) == (0, 0)
    assert {name: outcome_value(str(entry.outcome)).status for name, entry in entries.items() if entry} == done
    assert done.keys() == expected.keys()
    other = {name: status for name, status in done.items() if status is not expected[name]}
    assert set(other.values()) <= KILLED
    assert len(other) <= 6, other


def test_an_unknown_search_or_a_late_deadline_is_one_error_and_the_pool_serves_on(cluster: Cluster) -> None:
    asyncio.run(bad_jobs(cluster))


async def bad_jobs(cluster: Cluster) -> None:
    pool = RayPool(cluster.address)
    await pool.start()
    with pytest.raises(ValueError, match=r"deadline=.*: it has passed; give a later"):
        pool.submit(TASK, Candidate("x"), search="s", deadline=time.monotonic() - 1)
    order = Order(JobStage.EVALUATE, TASK, Candidate("x"), "nobody")
    with pytest.raises(ValueError, match="search='nobody': the pool does not know it; open it first"):
        await ray_head.find_head().submit.remote(pool.name, "stray", order)
    late = order._replace(deadline=time.time() - 5)
    await ray_head.find_head().open_search.remote("nobody")
    with pytest.raises(ValueError, match="it has passed"):
        await ray_head.find_head().submit.remote(pool.name, "stray", late)
    other = RayPool(None)
    served = [one.submit(TASK, Candidate("x = 1"), search="same name") for one in (pool, other)]
    assert [(await job.verdict()).status for job in served] == [Status.COMPILE_ERROR] * 2
    assert b"specgen_pool_gpu_busy_share" in await ray_head.find_head().metrics.remote()
    await when(lambda: pool.admission(4, 1e6).forks == 4, 10.0)  # its last look may be of before the first evaluator
    assert pool.admission(4, 0.0, generate_s=1.0).forks == 0
    assert RayPool(None).admission(4, 0.0, generate_s=1.0).forks == 4, "nothing is known before the head was heard"
    await ray_head.find_head().leave.remote("nobody")
    await other.close()
    await pool.close()


@pytest.mark.timeout(290)
def test_a_server_that_is_killed_and_started_again_finds_the_pool_free_within_seconds(cluster: Cluster) -> None:
    asyncio.run(killed_server(cluster))


async def killed_server(cluster: Cluster) -> None:
    count, root = 30, str(Path(__file__).parents[2])
    watcher = RayPool(None)
    await watcher.start()
    assert await watcher.check_task(TASK) is None
    await when(lambda: watcher.snapshot()["ready"] >= 1)
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.pools.ray_server", cluster.address, str(count),
        cwd=root, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert server.stdout is not None
    said, name = (await server.stdout.readline()).decode().split()
    assert said == "submitted"
    await when(lambda: watcher.snapshot()["busy"] >= 1)
    server.kill()
    await server.wait()
    killed = time.monotonic()
    await when(lambda: (watcher.snapshot()["queued"], watcher.snapshot()["busy"]) == (0, 0))
    free_s = time.monotonic() - killed
    print(f"the pool was free {free_s:.1f} s after the kill; {count} jobs of {SLEEP_S} s had been there")
    assert free_s < 30 < count * SLEEP_S / 2 - 2 * SLEEP_S
    again = RayPool(None)
    assert (await again.submit(TASK, sleeper(count, 0.0), search="s").verdict()).status is Status.WRONG
    await when(lambda: watcher.snapshot()["clients"] == 2, 10.0)
    check_cancelled(cluster.journal, [f"{name}/{number}" for number in range(count)])
    await again.close()
    await watcher.close()


def check_cancelled(path: Path, jobs: list[str]) -> None:
    from specgen_engine.pools.job import outcome_value
    from specgen_engine.pools.journal import Journal

    with Journal(path) as journal:
        verdicts = [outcome_value(str(journal.entry(job).outcome)) for job in jobs]
    assert {verdict.status for verdict in verdicts} <= {Status.CANCELLED, Status.WRONG}
    reasons = [verdict.reason for verdict in verdicts if verdict.status is Status.CANCELLED]
    assert reasons.count("the server that asked for it has died") >= len(jobs) - 6, reasons


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"address 127\.0\.0\.1:1: nothing answers there \(Connection refused\); see that the first"),
        ("nowhere", "address nowhere: use HOST:PORT"),
    ],
)
def test_a_ray_address_that_does_not_answer_is_one_error_at_once(address: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(PoolError, match=message):
        RayPool(address)
    assert time.monotonic() - started < 10
