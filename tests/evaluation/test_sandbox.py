"""What a candidate reaches at each level, and that nothing it starts outlives its verdict."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from specgen_engine.evaluation import sandbox
from specgen_engine.evaluation.base import Candidate, Status, Verdict

from .conftest import LIMITS, TASK, PoolThread, module

MARK = f"3600.{os.getpid()}"
ESCAPES = f"""
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.execvp("sleep", ["sleep", "{MARK}"])
        os._exit(0)
time.sleep(0.2)
raise RuntimeError("children: " + str(len(os.listdir("/proc"))))
"""
REACHES = """
import os
def _try(name, action):
    try:
        action()
        return name
    except OSError:
        return ""
import _socket
_found = [
    _try("inet", lambda: _socket.socket(_socket.AF_INET)),
    _try("shadow", lambda: open("/etc/shadow").read()),
    _try("secret", lambda: open(%r).read()),
    _try("write", lambda: open("/var/tmp/specgen-sandbox-test", "w")),
    _try("signal", lambda: os.kill(%d, 0)),
    _try("environ", lambda: open("/proc/%d/environ").read()),
    _try("scratch", lambda: open("own.txt", "w")),
    "variable" if any("SPECGEN_TEST_SECRET" in name for name in os.environ) else "",
]
raise LookupError("reaches: " + " ".join(filter(None, _found)))
"""


@pytest.fixture(scope="module", params=["prefer", "off"])
def sandboxed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolThread]:
    os.environ["SPECGEN_TEST_SECRET"] = "x"
    thread = PoolThread(tmp_path_factory.mktemp("builds"), replace(LIMITS, sandbox=request.param))
    del os.environ["SPECGEN_TEST_SECRET"]
    yield thread
    thread.close()


def _judge(thread: PoolThread, source: str) -> Verdict:
    async def run() -> Verdict:
        return await thread.pool.submit(TASK, Candidate(source), search="test").verdict()

    return thread.call(run())


def test_reach(sandboxed: PoolThread, tmp_path: Path) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text("key")
    verdict = _judge(sandboxed, module(top=REACHES % (str(secret), os.getpid(), os.getpid())))
    assert verdict.status is Status.COMPILE_ERROR, verdict
    reached = set(verdict.reason.split("reaches: ")[1].split())
    if verdict.sandbox == sandbox.PROCESS:  # what the level is worth: these guards are the sandbox's
        assert reached >= {"inet", "secret", "write", "scratch"}
        Path("/var/tmp/specgen-sandbox-test").unlink(missing_ok=True)
    else:
        assert reached == {"scratch"}
    assert "variable" not in reached


def test_escaped_processes_are_ended(sandboxed: PoolThread) -> None:
    verdict = _judge(sandboxed, module(ESCAPES))
    assert verdict.status is Status.RUNTIME_ERROR, verdict
    time.sleep(0.05)
    assert not [p for p in psutil.process_iter(["cmdline"]) if MARK in (p.info["cmdline"] or [])]


def test_fork_bomb(sandboxed: PoolThread) -> None:
    worker = psutil.Process(sandboxed.pool._slots[0].process.pid)
    verdict = _judge(sandboxed, module("import os, time\nwhile True:\n    os.fork()\n    time.sleep(0.03)"))
    assert verdict.status in (Status.RUNTIME_ERROR, Status.CRASH), verdict
    assert _judge(sandboxed, module()).status is Status.CORRECT
    assert len(worker.children(recursive=True)) <= 9  # the judge, the spare, one candidate, with what is around each


def test_require_is_refused_where_it_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_works", lambda *_: False)
    assert sandbox.level("prefer") == sandbox.PROCESS
    with pytest.raises(sandbox.SandboxError, match="sandbox=require"):
        sandbox.level("require")
