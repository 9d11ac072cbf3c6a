"""A server as a child process: started, waited for, and gone with everything it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from specgen_engine.errors import SpecGenError
from specgen_engine.leaving import unwound_on_sigterm
from specgen_engine.serving.preload import Template


@dataclass(frozen=True, slots=True)
class Server:
    """url has no path; log holds what all its processes print; startup_s: launch to first healthy answer."""

    url: str
    pid: int
    log: Path
    startup_s: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
    template: Template | None = None,
) -> Iterator[Server]:
    """`python -m sglang.launch_server ARGUMENTS --port FREE`, healthy; on leaving, its whole process tree is dead.

    template: fork the server from it (tests) instead of starting a new interpreter. Raises SpecGenError with the log's
    last error line when the server ends or is not healthy within timeout_s.
    """
    port = free_port()
    variables = dict(os.environ if environment is None else environment)
    words = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
    started = time.monotonic()
    url = f"http://127.0.0.1:{port}"
    with unwound_on_sigterm():
        process = psutil.Process(template.start(words, variables, log) if template else _launch(words, log, variables))
        try:
            _wait_healthy(process, url, log, started + timeout_s)
            yield Server(url, process.pid, log, time.monotonic() - started)
        finally:
            kill_tree(process)


def _launch(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    command = [sys.executable, "-m", "sglang.launch_server", *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        ).pid


def _wait_healthy(process: psutil.Process, url: str, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if not _alive(process):
            raise SpecGenError(f"the server ended before it was up: {last_error(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.25)
    raise SpecGenError(f"the server was not healthy in time: {last_error(log)}")


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def last_error(log: Path) -> str:
    """The last line that looks like an error, else the last line; at most 400 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("specgen:") or "Error" in line]
    return (errors or lines or ["(empty log)"])[-1][:400]


def kill_tree(process: psutil.Process, grace_s: float = 1, patience_s: float = 5) -> None:
    """SIGTERM, after grace_s SIGKILL, to the process, its group and every descendant; waits patience_s for their end.

    A longer grace is of no use: SGLang takes its scheduler's end for a crash and sleeps 5 s before it looks into it.
    """
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        _signal(one, signal.SIGTERM)
    for one in _left_of(family, grace_s):
        _signal(one, signal.SIGKILL)
    _left_of(family, patience_s)
    psutil.wait_procs(family, timeout=0)  # reaps the one that this process started
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _left_of(family: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after timeout_s. Zombies do not: whoever inherits them takes seconds to reap them."""
    deadline = time.monotonic() + timeout_s
    while (left := [one for one in family if _holds_something(one)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _holds_something(process: psutil.Process) -> bool:
    """Of a zombie other threads may be on their way out, with a GPU's memory still theirs."""
    try:
        return _alive(process) or (process.is_running() and process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
