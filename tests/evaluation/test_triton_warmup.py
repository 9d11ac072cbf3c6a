"""A worker warms Triton's compiler up for its children, and leaves no trace in the environment or on the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROBE = """
import os, sys, tempfile
from specgen_engine.evaluation.triton_warmup import _compile, warm_up_compiler
warm_up_compiler()
from triton.runtime import cache
from triton.backends.nvidia import compiler
print(cache.triton_key.cache_info().currsize, compiler.get_ptxas_version.cache_info().currsize)
print(os.environ.get("TRITON_CACHE_DIR"), os.listdir(tempfile.gettempdir()), len(os.listdir("/proc/self/task")))
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
_compile()
print(len(os.listdir(sys.argv[1])) > 0)
"""


def test_what_a_candidate_would_do_first_is_done_and_its_own_cache_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "own").mkdir()
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "own")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.stdout.splitlines() == ["1 1", "None [] 1", "True"], done.stdout + done.stderr
