"""What every report says of its origin: the machine, the command that repeats it, the commit and the seed.

Standard library only, every probe guarded: it runs wherever a benchmark does.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from specgen_engine.files import write_whole

ROOT = Path(__file__).resolve().parents[2]


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpus() -> tuple[list[str], str | None]:
    """GPU names and the driver's version, by nvidia-smi."""
    said = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not said:
        return [], None
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines()]
    return [row[0] for row in rows], rows[0][1]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_driver_api() -> str | None:
    try:
        value = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(value))
    except OSError:
        return None
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def describe_machine() -> dict[str, Any]:
    """CPU and GPU names and counts, driver, CUDA, torch and sglang versions; None for what isn't there."""
    gpus, driver = _gpus()
    torch_version = _version("torch")
    if "torch" in sys.modules:
        torch_version = str(sys.modules["torch"].__version__)
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "gpu": gpus[0] if gpus else None,
        "gpus": len(gpus),
        "gpu_names": gpus,
        "driver": driver,
        "cuda": _cuda_driver_api(),
        "torch": torch_version,
        "sglang": _version("sglang"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """The commit of the tree, with `+changes` when it differs; SPECGEN_COMMIT where the tree travels without git."""
    head = _output(["git", "rev-parse", "HEAD"])
    if head is None:
        return os.environ.get("SPECGEN_COMMIT")
    return head + ("+changes" if _output(["git", "status", "--porcelain", "--untracked-files=no"]) else "")


def command_line(module: str | None = None) -> str:
    """The command that repeats this run, without the folder of the interpreter or script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module is None and spec is not None and spec.name not in ("__main__", "specgen_engine.__main__"):
        module = spec.name.removesuffix(".__main__")
    start = ["python", "-m", module] if module else ["specgen"]
    return shlex.join([*start, *sys.argv[1:]])


def new_report(schema: str, seed: int | None, module: str | None = None) -> dict[str, Any]:
    """The head of a report: schema, machine, command, commit, seed. The caller adds the measurements."""
    return {
        "schema": schema,
        "machine": describe_machine(),
        "command": command_line(module),
        "commit": commit(),
        "seed": seed,
    }


def write_report(path: Path, report: dict[str, Any], text: str = "") -> None:
    """Write JSON whole or not at all; text: the same in Markdown, beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if text:
        write_whole(path.with_suffix(".md"), text)
