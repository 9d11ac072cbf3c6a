"""Starting and ending a worker's process on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation.limits import EvaluationLimits

GRACE_S = 6.0
LINE_BYTES = 16 << 20


def start_process(
    theirs: socket.socket, device: str, cache: Path, limits: EvaluationLimits, log: int | None, *more: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """(evaluation.worker_main at work, its scratch folder). more: its last arguments."""
    scratch = Path(tempfile.mkdtemp(prefix="specgen-worker-"))
    command = [sys.executable, "-m", "specgen_engine.evaluation.worker_main", str(theirs.fileno()), device]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [*command, str(cache), str(scratch), json.dumps(limits.to_dict()), *more],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        env={**os.environ, **threads, "PYTHONPATH": _import_path()},
        start_new_session=True,
    )
    return process, scratch


async def read_messages(reader: asyncio.StreamReader, take: Callable[[dict[str, Any]], None]) -> None:
    """Hand over what a process says until its socket is closed, or it says what is no message."""
    try:
        while line := await reader.readline():
            take(json.loads(line))
    except (ConnectionError, ValueError):
        pass


def bury(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """Let a worker whose socket is closed kill what it started; then make sure that it is gone."""
    try:
        process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(scratch, ignore_errors=True)


def _import_path() -> str:
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
