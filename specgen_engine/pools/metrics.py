"""The account as Prometheus series: collected on demand, or as counters of this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .accounting import Account, Gpu, Outcome

OTHER = "other"
NAMED = 64
"""Searches that are named in a series; the others are added up."""


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
