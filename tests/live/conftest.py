"""One real server on the CPU for all tests here: keys, traces and metrics on, replaying a small trace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import Server, running_server
from tests.live.collector import Collector
from tests.live.recording import TASK, reach, write_trace
from tests.server_log import traceback_in
from tests.template import TRACING

KEY, ADMIN = "user-key", "admin-key"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", **TRACING}
SEARCH = {"task": TASK, "name": "rows", "trigger": "every:400", "termination": "speedup:1.5"}
PROMPT = f"Make this faster.\n\n```python\n{TASK}```"


@dataclass(frozen=True)
class Live:
    """A server, its processes when it came up, and the files beside it that code of others must not reach."""

    server: Server
    collector: Collector
    secret: Path
    pids: frozenset[int]

    def get(self, path: str, key: str | None = ADMIN, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.server.url + path, headers=headers, timeout=60, **options)

    def chat(self, specgen: Any = None, prompt: str = PROMPT, **options: Any) -> Any:
        extra = {} if specgen is None else {"extra_body": {"custom_params": {"specgen": specgen}}}
        client = OpenAI(base_url=f"{self.server.url}/v1", api_key=KEY, timeout=300, max_retries=0)
        return client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": prompt}], **{"max_tokens": 9000, **options}, **extra
        )

    def search(self, **changes: Any) -> dict[str, Any]:
        """Run one to its end; its record."""
        return self.chat(json.dumps({**SEARCH, **changes})).model_dump()["sglext"]["specgen"]

    def still_runs(self) -> bool:
        return all(map(psutil.pid_exists, self.pids)) and self.get("/health", None).status_code == 200


@pytest.fixture(scope="session")
def live(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    secret, log = folder / "secret", folder / "log"
    secret.write_text("key")
    trace = write_trace(folder / "rows", reach(secret, log, os.getpid()))
    collector = Collector()
    launch = prepare(
        [
            "--tiny", "--replay", str(trace), "--reasoning-parser", "deepseek-r1", "--enable-metrics",
            "--api-key", KEY, "--admin-api-key", ADMIN, "--enable-trace", "--otlp-traces-endpoint", collector.endpoint,
            "--specgen-evaluation-cache", str(folder / "builds"), "--specgen-evaluation-task-s", "15",
            "--specgen-evaluation-memory-gb", "2", "--specgen-tasks-roots", str(trace),
        ]
    )  # fmt: skip
    with running_server(launch.arguments, log, {**launch.environment, **ENVIRONMENT}, template=template) as server:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        workers = {one.pid for one in family if "worker_main" in " ".join(one.cmdline())}
        yield Live(server, collector, secret, frozenset({one.pid for one in family} - workers))
    text = log.read_text(errors="replace")
    collector.close()
    assert not traceback_in(text), traceback_in(text)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """Headless Chromium, as Debian packages it."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1360,1150", "--force-device-scale-factor=1.5",
                 f"--user-data-dir={tmp_path}/chromium"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()
