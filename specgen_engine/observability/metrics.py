"""specgen_* metrics, exported through SGLang's own /metrics (--enable-metrics)."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from specgen_engine.controller.report import SearchRecord

SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """Created in the server process after SGLang has set up prometheus' multiprocess folder."""

    def __init__(self) -> None:
        self.searches_running = Gauge("specgen_searches_running", "Searches in progress.", multiprocess_mode="livesum")
        self.searches = Counter("specgen_searches", "Searches by what ended them.", ["ended_by"])
        self.forks = Counter("specgen_forks", "Forks by final state.", ["state"])
        self.candidates = Counter("specgen_candidates", "Distinct candidates by status.", ["status"])
        self.tokens = Counter("specgen_tokens", "Tokens by kind.", ["kind"])
        self.prefix_tokens = Counter("specgen_fork_prefix_tokens", "Fork input tokens, reused or computed.", ["how"])
        self.verdict_s = Histogram("specgen_verdict_seconds", "Submission to verdict.", buckets=SECONDS)
        self.search_s = Histogram("specgen_search_seconds", "Whole searches.", buckets=SECONDS)

    def observe(self, record: SearchRecord, running: int) -> None:
        """Count a search that has ended."""
        self.searches_running.set(running)
        self.searches.labels(record.ended_by or "error").inc()
        self.search_s.observe(record.wall_s or 0.0)
        for kind, count in (
            ("reasoning", record.reasoning_tokens),
            ("answer", record.answer_tokens),
            ("fork", record.fork_tokens),
        ):
            self.tokens.labels(kind).inc(count)
        for fork in record.forks:
            self.forks.labels(fork.state.partition(":")[0]).inc()
            self.prefix_tokens.labels("reused").inc(fork.prefix_reused)
            self.prefix_tokens.labels("computed").inc(fork.prefix_computed)
        for candidate in record.candidates:
            self.candidates.labels(str(candidate.status)).inc()
            if candidate.verdict_s is not None:
                self.verdict_s.observe(candidate.verdict_s - candidate.submitted_s)
