"""Where the evaluator GPUs' time went: GPU-seconds by search, stage and outcome, and each GPU's busy share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

OTHER = "other"
NAMED = 64
Gpu = int | str
"""Its number, or in a live pool its name (host and device)."""


class Outcome(StrEnum):
    """useful: its result came in time.  superseded: its reasoning had gone on without it.  cancelled: killed."""

    USEFUL = "useful"
    SUPERSEDED = "superseded"
    CANCELLED = "cancelled"


class Spent(NamedTuple):
    search: str
    stage: str
    outcome: Outcome


class Account:
    """Busy time only: correctness, timing and profile work on a GPU. Compiling, start-up and role switches are idle.

    Not thread-safe; used from the pool's event loop. Times are seconds of one monotonic clock.
    """

    def __init__(self) -> None:
        self.seconds: dict[Spent, float] = defaultdict(float)
        self._busy: dict[Gpu, float] = {}
        self._present: dict[Gpu, float] = {}
        self._joined: dict[Gpu, float] = {}

    def join(self, gpu: Gpu, now: float) -> None:
        """A GPU is in the pool from now on. Raises ValueError when it is already."""
        if gpu in self._joined:
            raise ValueError(f"gpu={gpu}: it is in the pool already")
        self._joined[gpu] = now
        self._busy.setdefault(gpu, 0.0)
        self._present.setdefault(gpu, 0.0)

    def leave(self, gpu: Gpu, now: float) -> None:
        """Its busy share stays, counted over the time it was there. Raises ValueError when it is not in the pool."""
        if gpu not in self._joined:
            raise ValueError(f"gpu={gpu}: it is not in the pool")
        self._present[gpu] += now - self._joined.pop(gpu)

    def record(self, search: str, stage: str, outcome: Outcome, gpu: Gpu, seconds: float) -> None:
        """Raises ValueError when seconds is negative or the GPU never joined."""
        if not seconds >= 0:
            raise ValueError(f"seconds={seconds}: use a number of at least 0")
        if gpu not in self._busy:
            raise ValueError(f"gpu={gpu}: it never joined the pool")
        self.seconds[Spent(search, stage, outcome)] += seconds
        self._busy[gpu] += seconds

    def utilisation(self, now: float) -> dict[Gpu, float]:
        """Busy share by GPU, 0 to 1, over the time that each was in the pool; 0 for one that has just joined."""
        shares = {}
        for gpu, busy in self._busy.items():
            present = self._present[gpu] + (now - self._joined[gpu] if gpu in self._joined else 0.0)
            shares[gpu] = busy / present if present > 0 else 0.0
        return shares

    def by_search(self) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(float)
        for spent, seconds in self.seconds.items():
            totals[spent.search] += seconds
        return dict(totals)

    def by_outcome(self) -> dict[Outcome, float]:
        totals = dict.fromkeys(Outcome, 0.0)
        for spent, seconds in self.seconds.items():
            totals[spent.outcome] += seconds
        return totals

    def total(self) -> float:
        return sum(self.seconds.values())


class AccountCollector(Collector):
    """Prometheus series of an account. Searches beyond the `searches` that took most are added up as "other".

    clock: gives now, in the account's clock.
    """

    def __init__(self, account: Account, clock: object, searches: int = NAMED) -> None:
        if not callable(clock):
            raise TypeError("clock: use a function that returns seconds, like time.monotonic")
        self.account, self.clock, self.searches = account, clock, searches

    def collect(self) -> Iterator[Metric]:
        seconds = CounterMetricFamily(
            "specgen_pool_gpu_seconds", "Busy GPU-seconds of the evaluator pool.", labels=["search", "stage", "outcome"]
        )
        totals = self.account.by_search()
        named = set(sorted(totals, key=lambda name: -totals[name])[: self.searches])
        grouped: dict[tuple[str, str, str], float] = defaultdict(float)
        for spent, value in self.account.seconds.items():
            grouped[spent.search if spent.search in named else OTHER, spent.stage, spent.outcome] += value
        for labels, value in grouped.items():
            seconds.add_metric(labels, value)
        yield seconds
        busy = GaugeMetricFamily(
            "specgen_pool_gpu_busy_share", "Busy share of each evaluator GPU, 0 to 1.", labels=["gpu"]
        )
        for gpu, share in self.account.utilisation(self.clock()).items():
            busy.add_metric([str(gpu)], share)
        yield busy


class PoolMetrics:
    """The same series as plain counters, which also work in prometheus' multiprocess mode (SGLang's /metrics).

    Counters are never taken back, so the first NAMED searches keep their names and later ones add up as "other".
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or REGISTRY
        self._named: set[str] = set()
        self.seconds = Counter(
            "specgen_pool_gpu_seconds",
            "Busy GPU-seconds of the evaluator pool.",
            ["search", "stage", "outcome"],
            registry=registry,
        )
        self.jobs = Counter(
            "specgen_pool_jobs", "Attempts that ended, by stage and outcome.", ["stage", "outcome"], registry=registry
        )
        self.share = Gauge(
            "specgen_pool_gpu_busy_share", "Busy share of each evaluator GPU, 0 to 1.", ["gpu"],
            multiprocess_mode="livemostrecent", registry=registry,
        )  # fmt: skip

    def record(self, search: str, stage: str, outcome: Outcome, seconds: float) -> None:
        if len(self._named) < NAMED:
            self._named.add(search)
        self.seconds.labels(search if search in self._named else OTHER, stage, outcome).inc(seconds)
        self.jobs.labels(stage, outcome).inc()

    def shares(self, utilisation: dict[Gpu, float]) -> None:
        for gpu, share in utilisation.items():
            self.share.labels(str(gpu)).set(share)


@cache
def process_metrics() -> PoolMetrics:
    """Those in this process's default registry; made once."""
    return PoolMetrics()


def exposition(account: Account, now: float, searches: int = NAMED) -> bytes:
    """The account in Prometheus' text format, as of now."""
    registry = CollectorRegistry()
    registry.register(AccountCollector(account, lambda: now, searches))
    return generate_latest(registry)
