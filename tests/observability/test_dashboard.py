"""grafana.json is what Grafana imports, asks only for metrics that exist, and Prometheus understands its queries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from specgen_engine.observability.dashboard import FILE, dashboard
from specgen_engine.observability.metrics import Metrics
from specgen_engine.serving.process import free_port
from tests.controller.fakes import ended_record

SOURCE = {"type": "object", "required": ["type", "uid"], "properties": {"type": {"const": "prometheus"}}}
SCHEMA = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "time", "templating", "panels"],
    "properties": {
        "uid": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"},
        "title": {"type": "string", "minLength": 1},
        "schemaVersion": {"type": "integer", "minimum": 30},
        "time": {"type": "object", "required": ["from", "to"]},
        "templating": {
            "type": "object",
            "required": ["list"],
            "properties": {
                "list": {"type": "array", "items": {"properties": {"type": {"const": "datasource"}}}}
            },
        },
        "panels": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["id", "type", "title", "gridPos", "datasource", "targets", "fieldConfig"],
                "properties": {
                    "type": {"enum": ["timeseries", "stat"]},
                    "datasource": SOURCE,
                    "gridPos": {
                        "type": "object",
                        "required": ["x", "y", "w", "h"],
                        "properties": {
                            "x": {"type": "integer", "minimum": 0, "maximum": 23},
                            "w": {"type": "integer", "minimum": 1, "maximum": 24},
                        },
                    },
                    "targets": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["refId", "expr", "datasource"],
                            "properties": {"expr": {"type": "string", "pattern": "specgen_"}, "datasource": SOURCE},
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip


def shown() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def queries() -> list[str]:
    return [target["expr"] for panel in shown()["panels"] for target in panel["targets"]]


def filled() -> CollectorRegistry:
    """Every metric with a value of each label that a search gives it."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    record = ended_record()
    record.forks[0].replica = 1
    metrics.observe(record, 0)
    metrics.observe_pool({"busy": 1, "ready": 2, "queued": 3})
    metrics.observe_replicas([1, 0])
    return registry


def test_the_file_is_the_dashboard_and_has_grafanas_shape() -> None:
    assert shown() == dashboard(), "run python -m specgen_engine.observability.dashboard"
    jsonschema.validate(shown(), SCHEMA)


def test_panels_lie_side_by_side() -> None:
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in shown()["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def test_every_metric_asked_for_exists_with_its_labels() -> None:
    samples = [sample for family in filled().collect() for sample in family.samples]
    labels = {sample.name: set(sample.labels) for sample in samples}
    for query in queries():
        asked = re.findall(r"(specgen_\w+)", query)
        assert asked
        for name in asked:
            assert name in labels, query
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert {one.strip() for one in by.split(",")} <= set().union(*(labels[name] for name in asked)), query


def test_every_metric_of_ours_is_shown() -> None:
    asked = " ".join(queries())
    for family in filled().collect():
        assert family.name in asked, family.name


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that has scraped these metrics twice; yields its address."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    port, mine = free_port(), free_port()
    server, thread = start_http_server(mine, addr="127.0.0.1", registry=filled())
    (folder / "config.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: specgen, static_configs: [{{targets: ['127.0.0.1:{mine}']}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={folder}/config.yml", f"--storage.tsdb.path={folder}/data",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                asked = {"query": "count_over_time(specgen_searches_running[1m])"}
                found = httpx.get(f"{url}/api/v1/query", params=asked).json()["data"]["result"]
                if found and float(found[0]["value"][1]) >= 3:
                    break
            except (httpx.HTTPError, KeyError, ValueError):
                pass
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()
        thread.join(10)


@pytest.mark.slow
@pytest.mark.parametrize("query", queries())
def test_prometheus_answers_every_query_with_a_series(prometheus: str, query: str) -> None:
    text = query.replace("$__rate_interval", "1m")
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": text}).json()
    assert answer["status"] == "success", answer
    assert answer["data"]["result"], query
