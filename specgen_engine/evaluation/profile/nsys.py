"""Nsight Systems: kernels and API calls from its SQLite export.

Written against the schema in NVIDIA's "SQLite Export Schema Reference" (tables CUPTI_ACTIVITY_KIND_KERNEL,
CUPTI_ACTIVITY_KIND_RUNTIME, StringIds; times in nanoseconds; tables are made only when they have rows).
UNTESTED with a live nsys: the parser is tested on a file made in that schema.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from .base import ProfileError
from .launches import Call, Launch, call_of

_KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
_API = "CUPTI_ACTIVITY_KIND_RUNTIME"
_WANTED = (
    "start", "end", "gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ",
    "registersPerThread", "staticSharedMemory", "dynamicSharedMemory",
)  # fmt: skip


class Trace(NamedTuple):
    """launch_api_ns: host time in launching calls of the CUDA runtime, which the GPU may or may not wait for."""

    call: Call
    launch_api_ns: float


def find_nsys() -> str:
    found = shutil.which("nsys")
    if not found:
        raise ProfileError("nsys: not installed (no nsys on PATH)")
    return found


def command(nsys: str, report: Path, driver: Sequence[str]) -> list[str]:
    """Writes report.sqlite beside report.nsys-rep; only what lies between cudaProfilerStart and Stop."""
    line = [nsys, "profile", "--trace=cuda", "--sample=none", "--cpuctxsw=none", "--capture-range=cudaProfilerApi"]
    return [*line, "--export=sqlite", "--force-overwrite=true", "-o", str(report), *driver]


def parse(path: Path) -> Trace:
    """Raises ProfileError when the file is no export of nsys or holds no kernel."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "StringIds" not in tables:
                raise ProfileError(f"nsys: {path.name} is no export of Nsight Systems (it has no StringIds)")
            if _KERNELS not in tables:
                raise ProfileError("nsys: the call launched no kernel")
            launches = _launches(database)
            host = _launch_api_ns(database) if _API in tables else 0.0
    except sqlite3.Error as error:
        raise ProfileError(f"nsys: {path.name} can't be read: {error}") from error
    return Trace(call_of(launches), host)


def _launches(database: sqlite3.Connection) -> list[Launch]:
    columns = {row[1] for row in database.execute(f"PRAGMA table_info({_KERNELS})")}
    missing = {"start", "end"} - columns
    name = next((column for column in ("shortName", "demangledName") if column in columns), None)
    if missing or name is None:
        raise ProfileError(f"nsys: {_KERNELS} has no {', '.join(sorted(missing)) or 'name'} column; schema changed")
    picked = ", ".join(f"k.{column}" if column in columns else "NULL" for column in _WANTED)
    query = f"SELECT s.value, {picked} FROM {_KERNELS} k LEFT JOIN StringIds s ON s.id = k.{name} ORDER BY k.start"
    launches = []
    for text, start, end, *rest in database.execute(query):
        grid, block, (registers, static, dynamic) = rest[:3], rest[3:6], rest[6:]
        launches.append(
            Launch(
                text or "unnamed",
                float(start),
                float(end),
                None if None in grid else (grid[0], grid[1], grid[2]),
                None if None in block else (block[0], block[1], block[2]),
                registers,
                None if static is None or dynamic is None else static + dynamic,
            )
        )
    return launches


def _launch_api_ns(database: sqlite3.Connection) -> float:
    query = (
        f"SELECT SUM(r.end - r.start) FROM {_API} r LEFT JOIN StringIds s ON s.id = r.nameId"
        " WHERE s.value LIKE '%Launch%'"
    )
    return float(database.execute(query).fetchone()[0] or 0.0)
