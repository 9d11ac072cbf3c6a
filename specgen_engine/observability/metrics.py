"""specgen_* metrics, exported through SGLang's own /metrics (--enable-metrics)."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from specgen_engine.controller.report import SearchRecord

SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Created in the server process after SGLang has set up prometheus' multiprocess folder."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        into: dict[str, Any] = {"registry": registry}
        alive: dict[str, Any] = {**into, "multiprocess_mode": "livesum"}
        timed: dict[str, Any] = {**into, "buckets": SECONDS}
        self.searches_running = Gauge("specgen_searches_running", "Searches in progress.", **alive)
        self.searches_on = Gauge("specgen_replica_searches_running", "By replica.", ["dp_rank"], **alive)
        self.forks_on = Counter("specgen_replica_forks", "Forks by data-parallel replica.", ["dp_rank"], **into)
        self.searches = Counter("specgen_searches", "Searches by what ended them.", ["ended_by"], **into)
        self.accepted = Counter("specgen_accepted", "Accepted candidates by who wrote them.", ["source"], **into)
        self.forks = Counter("specgen_forks", "Forks by final state.", ["state"], **into)
        self.forks_skipped = Counter("specgen_forks_skipped", "Triggers without a fork: all were in flight.", **into)
        self.candidates = Counter("specgen_candidates", "Distinct candidates by status.", ["status"], **into)
        self.tokens = Counter("specgen_tokens", "Tokens by kind.", ["kind"], **into)
        self.prefix_tokens = Counter(
            "specgen_fork_prefix_tokens", "Fork input tokens, reused or computed.", ["how"], **into
        )
        self.evaluators = Gauge("specgen_evaluators", "Evaluation workers by state.", ["state"], **alive)
        self.queued = Gauge("specgen_evaluations_queued", "Candidates that wait for a worker.", **alive)
        self.verdict_s = Histogram("specgen_verdict_seconds", "Submission to verdict.", **timed)
        self.stage_s = Histogram("specgen_stage_seconds", "Stages of evaluations.", ["stage"], **timed)
        self.search_s = Histogram("specgen_search_seconds", "Whole searches.", **timed)

    def observe_pool(self, pool: dict[str, Any]) -> None:
        """Workers and queue as Pool.snapshot() tells them."""
        self.evaluators.labels("busy").set(pool.get("busy", 0))
        self.evaluators.labels("ready").set(pool.get("ready", 0))
        self.queued.set(pool.get("queued", 0))

    def observe_replicas(self, searches: list[int]) -> None:
        """Running searches of each data-parallel replica; a server without replicas has no such series."""
        for replica, count in enumerate(searches if len(searches) > 1 else ()):
            self.searches_on.labels(str(replica)).set(count)

    def observe(self, record: SearchRecord, running: int) -> None:
        """Count a search that has ended."""
        self.searches_running.set(running)
        self.searches.labels(record.ended_by or "error").inc()
        self.search_s.observe(record.wall_s or 0.0)
        self.forks_skipped.inc(record.forks_skipped)
        if record.accepted is not None:
            self.accepted.labels(record.accepted["source"]).inc()
        for kind, count in (
            ("reasoning", record.reasoning_tokens),
            ("answer", record.answer_tokens),
            ("fork", record.fork_tokens),
        ):
            self.tokens.labels(kind).inc(count)
        for fork in record.forks:
            self.forks.labels(fork.state.partition(":")[0]).inc()
            if fork.replica is not None:
                self.forks_on.labels(str(fork.replica)).inc()
            self.prefix_tokens.labels("reused").inc(fork.prefix_reused)
            self.prefix_tokens.labels("computed").inc(fork.prefix_computed)
        for candidate in record.candidates:
            self.candidates.labels(str(candidate.status)).inc()
            if candidate.verdict_s is not None:
                self.verdict_s.observe(candidate.verdict_s - candidate.submitted_s)
            for stage, seconds in candidate.stages.items():
                self.stage_s.labels(stage).observe(seconds)
