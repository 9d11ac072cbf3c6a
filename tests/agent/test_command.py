"""`specgen optimize` against plain OpenAI endpoints made here: its answers, its errors, its resuming."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.testing import CliRunner

from specgen_engine.agent.base import AgentError
from specgen_engine.agent.command import optimize, options_of
from specgen_engine.agent.endpoint import Asking, Endpoint
from specgen_engine.cli import app
from specgen_engine.serving.process import free_port

TASK = """import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x) + 1
def get_inputs():
    return [torch.randn(64, 64)]
def get_init_inputs():
    return []
"""
ANSWER = """Here it is.
```python
import torch
class ModelNew(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x).add_({n})
```
"""


@dataclass
class Scripted:
    """A streaming chat endpoint that reasons, then answers with ANSWER: wrong at first, correct from the second on."""

    url: str = ""
    reasons: bool = True
    parsed: bool = True
    fail_at: int = 0
    ours: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)

    def chunks(self) -> list[dict[str, Any]]:
        number = len(self.asked)
        thinking = {"reasoning_content": "hm"} if self.parsed else {"content": "<think>\n```cpp\nint x;\n</think>"}
        deltas = [thinking] if self.reasons else []
        deltas.append({"content": ANSWER.format(n=1 if number > 1 else 2)})
        rows = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        rows.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18}})
        return [{"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", **row} for row in rows]


@pytest.fixture
def endpoint() -> Iterator[Scripted]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if script.ours and self.path.startswith(
                "/specgen/"
            ):  # a server with --admin-api-key, asked with the API key
                return self._answer(200 if self.path == "/specgen/openapi.json" else 401, "{}")
            found = self.path == "/v1/models"
            return self._answer(
                200 if found else 404, json.dumps({"data": [{"id": "m", "object": "model"}]} if found else {})
            )

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            script.asked.append(json.loads(body))
            if len(script.asked) == script.fail_at:
                return self._answer(422, json.dumps({"error": {"message": "no more"}}))
            stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in script.chunks()) + "data: [DONE]\n\n"
            return self._answer(200, stream, "text/event-stream")

        def _answer(self, code: int, text: str, kind: str = "application/json") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield script
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "tanh.py"
    path.write_text(TASK)
    return path


def run(task: Path, url: str, **changed: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "base_url": url, "model": "", "iterations": 2, "minutes": None, "tokens": None, "gpu_seconds": None,
        "searches": 1, "device": "cpu", "profile": "torch.profiler",
        "max_tokens": 100, "temperature": None, "trigger": None, "termination": None,
        "recorded": False, "out": task.parent / "out", "json": None, **changed,
    }  # fmt: skip
    optimize(options_of(task, **asked))
    return json.loads((asked["out"] / "report.json").read_text())


def test_a_failed_run_resumes_and_leaves_kernel_report_and_history(endpoint: Scripted, task: Path) -> None:
    endpoint.fail_at = 2
    with pytest.raises(AgentError, match=r"answered 422: .*no more"):
        run(task, endpoint.url, iterations=3)
    out = task.parent / "out"
    broken = json.loads((out / "report.json").read_text())
    assert [one["judgement"]["status"] for one in broken["attempts"]] == ["wrong"]
    assert "answered 422" in broken["ended_by"]
    assert not (out / "best.py").exists()

    report = run(task, endpoint.url, iterations=3, json=task.parent / "copy.json")
    statuses = [one["judgement"]["status"] for one in report["attempts"]]
    assert statuses == ["wrong", "correct", "correct"]
    assert len(endpoint.asked) == 4  # the failed one again, the first one not
    assert "The last one that failed" not in endpoint.asked[0]["messages"][0]["content"]
    assert "add_(2)" in endpoint.asked[2]["messages"][0]["content"]
    assert "add_(1)" in (out / "best.py").read_text()
    assert report["tokens"] == 33
    profiles = [one["judgement"]["profile"] for one in report["attempts"]]
    assert profiles[0] == ""
    assert "torch.profiler" in profiles[1]
    assert profiles[1].splitlines()[0] in endpoint.asked[3]["messages"][0]["content"]
    assert not report["settings"]["speculative"]
    assert json.loads((task.parent / "copy.json").read_text())["attempts"] == report["attempts"]
    assert "<svg" in (out / "report.html").read_text()


def test_a_token_budget_ends_two_searches(endpoint: Scripted, task: Path) -> None:
    report = run(task, endpoint.url, searches=2, iterations=50, tokens=33)
    assert "33 tokens are used" in report["ended_by"]
    assert len(report["attempts"]) in (3, 4)
    assert {one["search"] for one in report["attempts"]} == {1, 2}


def test_thinking_left_in_the_text_with_an_open_fence_is_taken_off(endpoint: Scripted, task: Path) -> None:
    endpoint.parsed = False
    report = run(task, endpoint.url, iterations=1)
    assert report["attempts"][0]["source"].startswith("import torch")
    assert "int x" not in report["attempts"][0]["generation"]["answer"]


def test_an_endpoint_that_does_not_reason_is_an_error(endpoint: Scripted, task: Path) -> None:
    endpoint.reasons = False
    with pytest.raises(AgentError, match="answered without reasoning; use a reasoning model"):
        run(task, endpoint.url)


def test_an_unreachable_endpoint_is_an_error_and_leaves_nothing(task: Path) -> None:
    with pytest.raises(AgentError, match=r"not reachable .*start the server"):
        run(task, f"http://127.0.0.1:{free_port()}/v1")
    assert list((task.parent / "out").iterdir()) == []


def test_a_task_that_is_not_there_is_one_line(task: Path) -> None:
    result = CliRunner().invoke(app, ["optimize", str(task.with_name("absent.py")), "--out", str(task.parent / "out")])
    assert "absent.py: No such file" in str(result.exception)
    assert not (task.parent / "out").exists()


def test_a_task_that_fails_its_own_reference_is_an_error(endpoint: Scripted, task: Path) -> None:
    task.write_text(TASK.replace("torch.tanh(x)", "torch.no_such(x)"))
    with pytest.raises(AgentError, match=r"task tanh: .*no_such"):
        run(task, endpoint.url)
    assert endpoint.asked == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--iterations", "0"], "--iterations 0: must be above zero"),
        (["--tokens", "0"], "--tokens 0: must be above zero"),
        (["--minutes", "inf"], "--minutes inf: must be above zero and finite"),
        (["--gpu-seconds", "nan"], "--gpu-seconds nan: must be above zero and finite"),
        (["--temperature", "inf"], "--temperature inf: must be finite"),
        (["--temperature", "nan"], "--temperature nan: must be finite"),
        (["--searches", "0"], "--searches 0: must be at least 1"),
        (["--trigger", "sometimes"], "--trigger='sometimes'"),
        (["--json", "/no/such/folder/f.json"], "its folder does not exist"),
        (["--device", "cuda:7"], "--device cuda:7"),
    ],
)
def test_bad_arguments_are_one_line(task: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["optimize", str(task), "--out", str(task.parent / "out"), *arguments])
    assert said in str(result.exception)
    assert not (task.parent / "out").exists()


def test_an_out_that_is_a_file_is_one_line(task: Path) -> None:
    for out, says in ((task, "File exists; name a folder"), (task / "deeper", "Not a directory; name a folder")):
        with pytest.raises(AgentError, match=rf"--out {out}: {says}"):
            run(task, "http://127.0.0.1:1/v1", out=out)
    assert task.read_text() == TASK


@pytest.mark.parametrize("ours", [False, True])
def test_our_server_is_known_with_no_more_than_the_api_key(endpoint: Scripted, ours: bool) -> None:
    endpoint.ours = ours

    async def speculative() -> bool:
        one = Endpoint(endpoint.url, "key", Asking("", 100))
        await one.connect()
        await one.close()
        return one.speculative

    assert anyio.run(speculative) is ours
