"""The head of every report: schema, machine, command, commit, seed (DESIGN.md, Reports)."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """CPU and GPU names and counts, driver, torch and sglang versions; absent parts are null, never guessed."""
    gpus, driver = _gpus()
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "driver": driver,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "sglang": _version("sglang"),
    }


def report_header(schema: str, seed: int | None) -> dict[str, Any]:
    return {
        "schema": schema,
        "machine": machine(),
        "command": _command(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
    }


def _command() -> str:
    """As it was typed, without the folder of the interpreter or script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else ""
    head = ["python", "-m", module] if module and module != "__main__" else [Path(sys.argv[0]).name]
    return shlex.join([*head, *sys.argv[1:]])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> tuple[list[str], str | None]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return [], None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles], str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
