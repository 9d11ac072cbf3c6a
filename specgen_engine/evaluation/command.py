"""`specgen evaluate`: verdicts of candidate files on a task, as a table for people and as JSON."""

from __future__ import annotations

import asyncio
import json as json_module
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.errors import SpecGenError
from specgen_engine.observability.machine import describe_machine, new_report
from specgen_engine.pools.local import LocalPool

from .base import Candidate, Task, Verdict
from .limits import EvaluationLimits

MAX_WORKERS = 8
TABLE_COLUMNS = 160
"""Width of the table where stderr is a file or a pipe."""


class BadInput(SpecGenError):
    """What was given can't be evaluated; nothing ran."""


def evaluate(
    task: Path,
    candidates: list[Path],
    *,
    device: str = "cpu",
    profile: bool = False,
    json: Path | None = None,
    workers: int | None = None,
    limits: EvaluationLimits | None = None,
) -> None:
    """Evaluate every candidate and print a table on stderr; JSON (specgen.verdicts/1) to a file when asked.

    A candidate is a Python file, or a recorded answer (.md) whose fenced module is taken.
    workers: default 1 on a CPU; on a GPU one for two cores, at most MAX_WORKERS: they compile side by side and take
    turns on the GPU.
    Raises BadInput (a task or file that can't be used, no such device) before anything of it is run or written.
    """
    limits = limits or EvaluationLimits()
    if profile:
        raise BadInput("--profile: profiling is not built yet; leave it out")
    if json is not None and not json.absolute().parent.is_dir():
        raise BadInput(f"--json {json}: its folder does not exist; make it first")
    require_device(device)
    reference = Task(_read(task, limits), name=task.parent.name if task.name == "task.py" else task.stem)
    named = [(path, Candidate(_read_candidate(path, limits))) for path in candidates]
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=TABLE_COLUMNS)
    workers = workers or _workers(device, len(named))
    verdicts, sandbox = asyncio.run(_run(reference, named, device, workers, limits, console))
    console.print(_table(reference, named, verdicts, device, sandbox))
    if json is not None:
        rows = [_row(path, verdict) for (path, _), verdict in zip(named, verdicts, strict=True)]
        head = new_report("specgen.verdicts/1", None)  # seeds come from the operating system
        _write(json, head | {"task": reference.name, "device": device, "sandbox": sandbox, "verdicts": rows})


async def _run(
    task: Task,
    named: list[tuple[Path, Candidate]],
    device: str,
    workers: int,
    limits: EvaluationLimits,
    console: Console,
) -> tuple[list[Verdict], str]:
    pool = LocalPool(workers=workers, device=device, limits=limits)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("starting workers", total=len(named))
            await pool.start()
            progress.update(bar, description="checking the task")
            fault = await pool.check_task(task)
            if fault:
                raise BadInput(f"task {task.name}: {fault}")
            jobs = [pool.submit(task, candidate, search="evaluate") for _, candidate in named]
            verdicts = []
            for (path, _), job in zip(named, jobs, strict=True):
                progress.update(bar, description=str(path.name))
                verdicts.append(await job.verdict())
                progress.advance(bar)
        return verdicts, str(pool.snapshot()["sandbox"])
    except RuntimeError as error:
        raise BadInput(str(error)) from error
    finally:
        await pool.close()


def _workers(device: str, candidates: int) -> int:
    if device == "cpu":
        return 1
    return max(1, min(MAX_WORKERS, candidates, len(os.sched_getaffinity(0)) // 2))


def require_device(device: str) -> None:
    if device == "cpu":
        return
    name, _, number = device.partition(":")
    gpus = describe_machine()["gpu_names"]
    if name != "cuda" or not (number or "0").isdigit():
        raise BadInput(f"--device {device}: use cpu or cuda:N")
    if int(number or 0) >= len(gpus):
        raise BadInput(
            f"--device {device}: this machine has {len(gpus)} GPUs that NVML can see; use cpu or a lower number"
        )


def _read(path: Path, limits: EvaluationLimits) -> str:
    try:
        size = path.stat().st_size
        if size > limits.source_bytes:
            raise BadInput(f"{path}: {size} bytes; at most {limits.source_bytes} are read")
        text = path.read_bytes().decode()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: binary bytes, not a text (byte {error.start})") from error
    if "\0" in text:
        raise BadInput(f"{path}: binary bytes, not a text (byte {text.index(chr(0))})")
    return text


def _read_candidate(path: Path, limits: EvaluationLimits) -> str:
    text = _read(path, limits)
    if path.suffix != ".md":
        return text
    source = extract_candidate(text)
    if source is None:
        raise BadInput(f"{path}: no fenced module in this answer")
    return source


def _table(
    task: Task, named: list[tuple[Path, Candidate]], verdicts: list[Verdict], device: str, sandbox: str
) -> Table:
    table = Table(title=f"{task.name} on {device}, sandbox {sandbox}")
    for name in ("candidate", "status", "speed-up", "95 %", "ms", "reference ms", "reason"):
        table.add_column(name, overflow="fold")
    for (path, _), verdict in zip(named, verdicts, strict=True):
        figures = ["", "", "", ""]
        if verdict.speedup is not None and verdict.interval is not None:
            low, high = verdict.interval
            figures = [f"{verdict.speedup:.2f}x", f"{low:.2f}-{high:.2f}"]
            figures += [f"{verdict.candidate_ms:.3f}", f"{verdict.reference_ms:.3f}"]
        table.add_row(str(path), str(verdict.status), *figures, verdict.reason)
    return table


def _row(path: Path, verdict: Verdict) -> dict[str, Any]:
    return {
        "candidate": str(path),
        "status": str(verdict.status),
        "speedup": verdict.speedup,
        "interval": verdict.interval,
        "candidate_ms": verdict.candidate_ms,
        "reference_ms": verdict.reference_ms,
        "reason": verdict.reason,
        "digest": verdict.digest,
        "sandbox": verdict.sandbox,
        "own_s": verdict.own_s,
        "stages": {str(stage): seconds for stage, seconds in verdict.stages.items()},
        "profile": None,
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        json_module.dump(report, file, indent=1)
    os.replace(temporary, path)
