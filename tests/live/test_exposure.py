"""A server that anyone can reach takes no task from a prompt; a reader of its events does not stop it from ending."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import free_port, kill_tree
from tests.live.conftest import ENVIRONMENT, PROMPT
from tests.live.recording import TASK


@contextmanager
def open_server(template: Template, log: Path, *words: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server on every interface of this machine, without a key."""
    port = free_port()
    launch = prepare(["--tiny", "--specgen-tasks", "prompt", "--specgen-trigger", "none", *words])
    arguments = [*launch.arguments, "--host", "0.0.0.0", "--port", str(port)]
    process = psutil.Process(template.start(arguments, {**launch.environment, **ENVIRONMENT}, log))
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.is_running(), log.read_text()[-2000:]
            time.sleep(0.3)
        yield url, process
    finally:
        kill_tree(process)


def chat(url: str, **body: object) -> httpx.Response:
    asked = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": PROMPT}], **body}
    return httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)


@pytest.mark.slow
def test_a_server_without_a_key_takes_no_task_from_a_prompt(template: Template, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open_server(template, log) as (url, process):
        assert chat(url).status_code == 200
        listing = httpx.get(f"{url}/specgen/searches").json()
        assert listing["searches"] == []
        assert "--specgen-allow-untrusted" in listing["prompt_tasks_refused"]
        assert log.read_text().count("--specgen-tasks prompt is not in force") == 1
        named = chat(url, custom_params={"specgen": "{}"})
        assert named.status_code == 400
        assert "specgen.task" in named.text
        assert "--api-key" in named.text
        sent = chat(url, custom_params={"specgen": json.dumps({"task": TASK, "termination": "none"})})
        assert sent.status_code == 200
        with httpx.stream("GET", f"{url}/specgen/events", timeout=60) as reader:
            lines = reader.iter_lines()
            assert next(lines).startswith("retry:")
            process.terminate()
            started = time.monotonic()
            process.wait(60)
            assert time.monotonic() - started < 30


@pytest.mark.slow
def test_the_operator_can_allow_it(template: Template, tmp_path: Path) -> None:
    with open_server(template, tmp_path / "log", "--specgen-allow-untrusted") as (url, _):
        assert chat(url).status_code == 200
        (row,) = httpx.get(f"{url}/specgen/searches").json()["searches"]
        assert row["named"] is False
