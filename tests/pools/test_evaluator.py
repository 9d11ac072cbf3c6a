"""`specgen evaluator`: what it refuses before anything is started, and one pool on the CPU from start to stop."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specgen_engine.cli import app
from specgen_engine.evaluation.base import Candidate, Status
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools import evaluator as command
from specgen_engine.pools.evaluator import EvaluatorError, EvaluatorOptions, evaluator, parse_gpus
from specgen_engine.pools.journal import JournalError
from tests.pools.burst import TASK

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, the server on the first."""
    monkeypatch.setattr(command, "describe_machine", lambda: {"gpu_names": ["NVIDIA H100"] * 2})
    monkeypatch.setattr(command, "server_on", lambda index: 4711 if index == 0 else None)
    monkeypatch.setattr(command, "_start_node", lambda options: pytest.fail("a node was started"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--gpus, --cpus: name either"),
        ({"gpus": (1,), "cpus": 1}, "--gpus, --cpus: name either"),
        ({"gpus": (1, 5)}, "--gpus 5: this machine has 2 GPUs that NVML can see; use lower indices"),
        ({"gpus": (0,)}, "--gpus 0: the SGLang server of process 4711 uses it; .* use another one"),
        ({"cpus": 1, "join": "127.0.0.1:1"}, "--join 127.0.0.1:1: nothing answers there"),
        ({"cpus": 1, "join": "there"}, "--join there: use HOST:PORT"),
        ({"cpus": 1, "lend": "much"}, "--specgen-kv-lend 'much': use auto or a size"),
        ({"cpus": 1, "limits": EvaluationLimits(sandbox="off"), "join": "127.0.0.1:1"}, "--sandbox: .* beside --join"),
        ({"cpus": 1, "lend": "auto", "join": "127.0.0.1:1"}, "--lend: .* leave it out beside --join"),
    ],
)
def test_what_cannot_be_offered_is_refused_before_anything_starts(two_gpus, options: dict, message: str) -> None:
    from specgen_engine.errors import SpecGenError

    with pytest.raises(SpecGenError, match=message):
        evaluator(EvaluatorOptions(**options))


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1,1"])
def test_gpu_lists_that_are_none(text: str) -> None:
    with pytest.raises(EvaluatorError, match=f"--gpus {text}: "):
        parse_gpus(text)


def test_a_port_that_is_taken_or_a_journal_cut_short(two_gpus, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EvaluatorError, match=f"--port {port}: it is taken; --join that pool"):
            evaluator(EvaluatorOptions(cpus=1, port=port))
    (tmp_path / "j.db").write_bytes(b"SQLite format 3\0")
    with pytest.raises(JournalError, match=r"j\.db: the journal is damaged or cut short"):
        evaluator(EvaluatorOptions(cpus=1, port=free_port(), journal=tmp_path / "j.db"))


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("--port", "99999999", "less than or equal to 65535"),
        ("--port", "0", "greater than or equal to 1"),
        ("--metrics-port", "65536", "less than or equal to 65535"),
        ("--cpus", "-1", "greater than or equal to 0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_command_line(two_gpus, option: str, value: str, limit: str) -> None:
    result = CliRunner().invoke(app, ["evaluator", "--cpus", "1", option, value])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert f"Invalid value for '{option}': Input should be {limit}" in said


def test_a_bad_journal_is_one_line_of_the_command(two_gpus, tmp_path: Path) -> None:
    (tmp_path / "j.db").write_bytes(b"SQLite format 3\0")
    words = ["evaluator", "--cpus", "1", "--port", str(free_port()), "--journal", str(tmp_path / "j.db")]
    done = subprocess.run(
        [sys.executable, "-m", "specgen_engine", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "j.db: the journal is damaged or cut short; move it away" in line


@pytest.mark.parametrize(("code", "asks"), [("UNAUTHENTICATED", True), ("UNIMPLEMENTED", False), (None, False)])
def test_a_token_is_sent_to_clusters_that_ask_for_one(code: str | None, asks: bool) -> None:
    import grpc

    from specgen_engine.pools.ray_head import CLUSTER_ID, asks_for_token

    class Answers(grpc.GenericRpcHandler):
        def service(self, call: Any) -> Any:
            assert call.method == CLUSTER_ID
            return grpc.unary_unary_rpc_method_handler(self.answer)

        def answer(self, _request: bytes, context: Any) -> bytes:
            if code is not None:
                context.abort(grpc.StatusCode[code], "by the test")
            return b""

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Answers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert asks_for_token(f"127.0.0.1:{port}") is asks
    server.stop(0).wait()
    assert not asks_for_token(f"127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "0" * 64], ids=["no token", "token"])
def test_a_pool_on_the_cpu_from_start_to_stop(tmp_path: Path, token: str) -> None:
    """With and without a Ray token in the home folder, which `ray start` then asks its clients for."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    port, metrics = free_port(), free_port()
    words = ["evaluator", "--cpus", "1", "--port", str(port), "--metrics-port", str(metrics)]
    first = subprocess.Popen(
        [sys.executable, "-m", "specgen_engine", *words, "--journal", str(tmp_path / "j.db")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert first.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: lines.put(first.stdout.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=90)
        assert "evaluating on 1 CPU workers; the pool's address is " in line
        client = [sys.executable, "-m", "tests.pools.test_evaluator", line.split()[-1]]
        said = subprocess.run(client, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
        assert said.stdout.split() == [Status.COMPILE_ERROR], said.stderr[-2000:]
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20) as answer:
            assert b'specgen_pool_gpu_seconds_total{outcome="useful"' in answer.read()
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0


async def client(address: str) -> None:
    from specgen_engine.pools.ray_pool import RayPool

    pool = RayPool(address)
    await pool.start()
    print((await pool.submit(TASK, Candidate("x = 1"), search="s").verdict()).status)
    await pool.close()


if __name__ == "__main__":
    asyncio.run(client(sys.argv[1]))
