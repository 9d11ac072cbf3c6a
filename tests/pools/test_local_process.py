"""A worker whose pool was killed leaves no folder behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

POOL = """
import json, os, socket, sys
from dataclasses import replace
from pathlib import Path
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local_process import start_process

ours, theirs = socket.socketpair()
process, scratch = start_process(theirs, "cpu", Path(sys.argv[1]), EvaluationLimits(spares=False), None, *sys.argv[2:])
theirs.close()
print(json.dumps({"worker": process.pid, "scratch": str(scratch)}), flush=True)
ours.recv(1)  # it is up, or has ended
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("role", [[], ["build"]], ids=["worker", "builder"])
def test_a_worker_takes_its_folder_along_when_its_pool_was_killed(tmp_path: Path, role: list[str]) -> None:
    pool = subprocess.run(
        [sys.executable, "-c", POOL, str(tmp_path / "cache"), *role], stdout=subprocess.PIPE, text=True, timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert pool.returncode == -9
    said = json.loads(pool.stdout)
    assert Path(said["scratch"]).parent == tmp_path
    deadline = time.monotonic() + 30
    while Path(said["scratch"]).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(said["scratch"]).exists()
    assert list(tmp_path.glob("specgen-worker-*")) == []
