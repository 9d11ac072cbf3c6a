"""Real SGLang servers on the CPU: one template process imports SGLang once, every server is forked from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from specgen_engine.replay.trace import load_traces
from specgen_engine.serving.command import Launch, prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import Server, running_server
from tests.server_log import traceback_in
from tests.template import STRICT

BUNDLED = Path(__file__).parents[2] / "specgen_engine" / "replay" / "bundled" / "cpu_row_softmax"
TASK = load_traces([BUNDLED])[0].task_source
QUICK_ANSWER = """Softmax and the weight, in place.

```python
import torch.nn as nn


class ModelNew(nn.Module):
    def forward(self, x, weight):
        return x.softmax(dim=-1).mul_(weight)
```
"""
"""Faster than the task by half and more; needs no compiler, which may take longer than a whole reasoning."""


@dataclass(frozen=True)
class Client:
    """A server and the ways a test talks to it."""

    server: Server

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.server.url}/v1", api_key="none", timeout=300, max_retries=0)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return httpx.post(self.server.url + path, json=body, timeout=300)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.server.url + path, timeout=60)

    def generate(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """Greedy /generate from token ids."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": False}
        answer = self.post("/generate", {"input_ids": ids, "sampling_params": params})
        answer.raise_for_status()
        return answer.json()

    def flush(self) -> None:
        """Once the engine is idle: aborted forks take a step to leave."""
        for _ in range(100):
            answer = self.post("/flush_cache")
            if answer.is_success:
                return
            time.sleep(0.2)
        answer.raise_for_status()

    def chat(self, prompt: str, specgen: Any = None, **options: Any) -> Any:
        body: dict[str, Any] = {"temperature": 0, "max_tokens": 64, **options}
        if specgen is not None:
            value = specgen if isinstance(specgen, bool) else json.dumps(specgen)
            body["extra_body"] = {**body.get("extra_body", {}), "custom_params": {"specgen": value}}
        return self.openai.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}], **body)


StartServer = Callable[..., AbstractContextManager[Client]]


@pytest.fixture(scope="session")
def start_server(template: Template, tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """start_server("--tiny", ...) -> a context manager that yields a Client; specgen=False leaves the flag out.

    variables: of the server's environment, beside those that every server here has. using: another template.
    """

    @contextmanager
    def start(
        *arguments: str, specgen: bool = True, variables: Mapping[str, str] | None = None, using: Template | None = None
    ) -> Iterator[Client]:
        launch: Launch = prepare(arguments)
        words = [word for word in launch.arguments if specgen or word != "--enable-specgen"]
        log = tmp_path_factory.mktemp("server") / "log"
        shared = using or (None if launch.environment.get("TRITON_INTERPRET") else template)
        environment = {**launch.environment, **STRICT, **(variables or {})}
        with running_server(words, log, environment, template=shared) as server:
            yield Client(server)
        text = log.read_text(errors="replace")
        assert "memory leak" not in text.lower(), text[-3000:]
        assert not traceback_in(text), traceback_in(text)

    return start
