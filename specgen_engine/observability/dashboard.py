"""The Grafana dashboard over specgen_* metrics; `python -m specgen_engine.observability.dashboard` writes grafana.json."""
# ruff: noqa: E501  (a panel a row)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("grafana.json")
SOURCE = {"type": "prometheus", "uid": "${source}"}
RATE = "[$__rate_interval]"


class Panel(NamedTuple):
    """queries: (PromQL, legend). kind: timeseries or stat. unit: Grafana's name of it."""

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{RATE}))"


def _quantile(metric: str, q: float, by: str = "le") -> str:
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{RATE})))"


PANELS = (
    Panel("Searches running", "In progress now.", (("sum(specgen_searches_running)", "running"),), kind="stat", width=4),
    Panel("Ended early", "Share of searches that the criterion ended, last hour.",
          (('sum(increase(specgen_searches_total{ended_by="criterion"}[1h])) / sum(increase(specgen_searches_total[1h]))', "early"),),
          "percentunit", "stat", 4),
    Panel("Prefix reused", "Share of fork input tokens that the radix tree had, last hour.",
          (('sum(increase(specgen_fork_prefix_tokens_total{how="reused"}[1h])) / sum(increase(specgen_fork_prefix_tokens_total[1h]))', "reused"),),
          "percentunit", "stat", 4),
    Panel("Evaluators busy", "Workers that judge a candidate, and those that could.",
          (('sum(specgen_evaluators{state="busy"})', "busy"), ('sum(specgen_evaluators{state="ready"})', "ready")), kind="stat", width=4),
    Panel("Candidates waiting", "For an evaluation worker.", (("sum(specgen_evaluations_queued)", "waiting"),), kind="stat", width=4),
    Panel("Triggers without a fork", "All forks were in flight, last hour.",
          (("sum(increase(specgen_forks_skipped_total[1h]))", "skipped"),), kind="stat", width=4),
    Panel("Searches by what ended them", "A second.", ((_rate("specgen_searches_total", "ended_by"), "{{ended_by}}"),), "ops"),
    Panel("Forks by final state", "A second.", ((_rate("specgen_forks_total", "state"), "{{state}}"),), "ops"),
    Panel("Candidates by status", "A second, distinct ones.", ((_rate("specgen_candidates_total", "status"), "{{status}}"),), "ops"),
    Panel("Submission to verdict", "Seconds, with waiting.",
          ((_quantile("specgen_verdict_seconds", 0.5), "p50"), (_quantile("specgen_verdict_seconds", 0.95), "p95")), "s"),
    Panel("Stages of an evaluation", "95th percentile of each.",
          ((_quantile("specgen_stage_seconds", 0.95, "le, stage"), "{{stage}}"),), "s"),
    Panel("Search", "Seconds from the request to its answer.",
          ((_quantile("specgen_search_seconds", 0.5), "p50"), (_quantile("specgen_search_seconds", 0.95), "p95")), "s"),
    Panel("Replicas", "With --dp-size: running searches, and forks a second.",
          (("sum by (dp_rank) (specgen_replica_searches_running)", "searches, replica {{dp_rank}}"),
           (_rate("specgen_replica_forks_total", "dp_rank"), "forks a second, replica {{dp_rank}}"))),
    Panel("Tokens by kind", "A second: reasoning, answers, forks.", ((_rate("specgen_tokens_total", "kind"), "{{kind}}"),), "ops", width=12),
    Panel("Accepted kernels by who wrote them", "A second: a fork, or the reasoning's own answer.",
          ((_rate("specgen_accepted_total", "source"), "{{source}}"),), "ops", width=12),
)  # fmt: skip


def _panel(number: int, panel: Panel, x: int, y: int, height: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
        for i, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def dashboard() -> dict[str, Any]:
    """Grafana's dashboard model (schemaVersion 39: Grafana 10.4 and later import it)."""
    panels, x, y, height = [], 0, 0, 4
    for number, panel in enumerate(PANELS, 1):
        if x + panel.width > 24:
            x, y, height = 0, y + height, 8
        panels.append(_panel(number, panel, x, y, 4 if panel.kind == "stat" else 8))
        x += panel.width
    return {
        "uid": "specgen-engine",
        "title": "SpecGen engine",
        "description": "Searches, forks and evaluations of SGLang servers that run with --enable-specgen --enable-metrics.",
        "tags": ["sglang", "specgen"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}]
        },
        "panels": panels,
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
