"""Hook reports of schedulers that SGLang's data-parallel controller starts; it drops what they say of themselves.

One file a scheduler, named by its process id, in a folder whose name they inherit; read once, before the server is up.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = "SPECGEN_REPORTS"
PIDS = "scheduler_pids"
"""Where the controller's own init info names its schedulers (managers/data_parallel_controller.py)."""


def await_reports() -> None:
    """In the server process, before any scheduler starts."""
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="specgen-reports-")


def leave(report: dict[str, Any]) -> None:
    """In a scheduler, before its init info is sent; does nothing where nobody waits for it."""
    if folder := os.environ.get(FOLDER):
        (Path(folder) / str(os.getpid())).write_text(json.dumps(report))


def of_schedulers(infos: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every scheduler reports: its init info's, or the file of each one behind a controller; empty where none is.

    Ends the waiting: the folder is removed.
    """
    folder = os.environ.pop(FOLDER, None)
    reports: list[dict[str, Any]] = []
    for info in infos:
        if folder is not None and PIDS in info:
            reports += [_read(Path(folder) / str(pid)) for pid in info[PIDS]]
        else:
            reports.append(info.get("specgen", {}))
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return reports


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}
