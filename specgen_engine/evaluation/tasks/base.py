"""What a loader makes of a task in any format: reference modules that a judge runs, one a workload."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from specgen_engine.errors import SpecGenError

from ..base import Task

TASK_BYTES = 4 << 20
"""A reference module or definition is text; what is larger is no task."""


class TaskError(SpecGenError):
    """A task that can't be used: one line naming the file, what is wrong and what is expected."""


class Format(StrEnum):
    KERNELBENCH = "kernelbench"
    FLASHINFER_TRACE = "flashinfer_trace"
    GPU_MODE = "gpumode"


class Workload(NamedTuple):
    """One timed set of shapes. origin: what the format knows of it (FlashInfer: the Workload's JSON object)."""

    name: str
    task: Task
    origin: dict[str, Any] | None = None


@dataclass(frozen=True)
class LoadedTask:
    """definition: a FlashInfer Trace Definition as a JSON object, else None."""

    name: str
    format: Format
    path: Path
    workloads: tuple[Workload, ...]
    definition: dict[str, Any] | None = None


def read_text(path: Path, most: int = TASK_BYTES) -> str:
    """Raises TaskError on a file that is absent, too large or no text."""
    try:
        size = path.stat().st_size
        if size > most:
            raise TaskError(f"{path}: {size} bytes; at most {most} are read")
        with path.open("rb") as file:  # a device has no size, and one like /dev/zero no end
            data = file.read(most + 1)
        if len(data) > most:
            raise TaskError(f"{path}: more than {most} bytes; at most so many are read")
        text = data.decode()
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: binary bytes, not a text (byte {error.start})") from error
    if "\0" in text:
        raise TaskError(f"{path}: binary bytes, not a text (byte {text.index(chr(0))})")
    return text


def parse_module(text: str, path: Path) -> ast.Module:
    """Raises TaskError with the line of a syntax error. Nothing of the module runs."""
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise TaskError(f"{path}: line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise TaskError(f"{path}: can't be parsed: {error or type(error).__name__}") from None
