"""`specgen evaluate`: verdicts of candidate files on a task, as a table for people and as JSON."""

from __future__ import annotations

import asyncio
import json as json_module
import os
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.errors import SpecGenError
from specgen_engine.files import require_writable, write_whole
from specgen_engine.kv.toolchain import find_nvcc
from specgen_engine.observability.machine import describe_machine, new_report
from specgen_engine.pools.local import LocalPool

from .base import Candidate
from .candidates.forms import detect_form
from .limits import EvaluationLimits
from .profile.base import CHOICES, ProfileError, Tool
from .tasks.base import Format, LoadedTask, TaskError, Workload, read_text
from .tasks.load import load_task
from .verdict_table import Judged, row_of, table_of

MAX_WORKERS = 8
TABLE_COLUMNS = 160
"""Width of the table where stderr is a file or a pipe."""
NEED_NVCC = frozenset({"cuda", "cuda_inline", "solution/cuda"})
DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "OutOfMemoryError")


class BadInput(SpecGenError):
    """What was given can't be evaluated; nothing ran."""


class Given(NamedTuple):
    """A candidate file. name: of a FlashInfer Solution its own, else the file's."""

    path: Path
    candidate: Candidate
    name: str


def evaluate(
    task: Path,
    candidates: list[Path],
    *,
    device: str = "cpu",
    profile: str = "",
    json: Path | None = None,
    traces: Path | None = None,
    workers: int | None = None,
    limits: EvaluationLimits | None = None,
) -> None:
    """Evaluate every candidate and print a table on stderr; JSON (specgen.verdicts/1) to a file when asked.

    task: what tasks/load.py reads. A candidate: a Python file, a plain .cu, a FlashInfer Solution (.json), or a
    recorded answer (.md) whose fenced module is taken.
    profile: the tool that profiles the correct ones ("auto": the best that works here), "" for none.
    traces: a .jsonl that gets one FlashInfer Trace a verdict (FlashInfer Trace tasks only).
    workers: default 1 on a CPU; on a GPU one for two cores, at most MAX_WORKERS: they compile side by side and take
    turns on the GPU.
    Raises BadInput, TaskError or another SpecGenError (a task or file that can't be used, no such device) before
    anything is written.
    """
    limits = limits or EvaluationLimits()
    for option, path in (("--json", json), ("--traces", traces)):
        if path is not None:
            require_writable(path, option)
    require_device(device)
    require_profiler(profile)
    loaded = load_task(task)
    if traces is not None and loaded.format is not Format.FLASHINFER_TRACE:
        raise BadInput(f"--traces {traces}: {task} is no FlashInfer Trace task")
    named = [_candidate(path, loaded, limits) for path in candidates]
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=TABLE_COLUMNS)
    workers = workers or _workers(device, len(named))
    judged, sandbox = asyncio.run(_run(loaded, named, device, workers, limits, console, profile))
    console.print(table_of(f"{loaded.name} on {device}, sandbox {sandbox}", judged))
    for one in judged:
        if one.verdict.profile:
            console.print(f"{one.path}\n{one.verdict.profile['text']}\n", markup=False, highlight=False)
    if json is not None:
        head = new_report("specgen.verdicts/1", None)  # seeds come from the operating system
        told = {"task": loaded.name, "format": str(loaded.format), "device": device, "sandbox": sandbox}
        report = head | told | {"verdicts": [row_of(one) for one in judged]}
        write_whole(json, json_module.dumps(report, indent=1))
    if traces is not None:
        _write_traces(traces, loaded, named, judged, device)


async def _run(
    loaded: LoadedTask,
    named: list[Given],
    device: str,
    workers: int,
    limits: EvaluationLimits,
    console: Console,
    profile: str,
) -> tuple[list[Judged], str]:
    pool = LocalPool(workers=workers, device=device, limits=limits, build_slots=0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    options = {"profile": profile} if profile else {}
    pairs = [(workload, given) for workload in loaded.workloads for given in named]
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("starting workers", total=len(pairs))
            await pool.start()
            progress.update(bar, description="checking the task")
            for workload in loaded.workloads:
                _require_usable(workload, await pool.check_task(workload.task), device)
            jobs = [
                pool.submit(workload.task, given.candidate, search="evaluate", options=options)
                for workload, given in pairs
            ]
            judged = []
            for (workload, given), job in zip(pairs, jobs, strict=True):
                progress.update(bar, description=" ".join(filter(None, (given.path.name, workload.name))))
                judged.append(Judged(given.path, workload.name, await job.verdict()))
                progress.advance(bar)
        return judged, str(pool.snapshot()["sandbox"])
    except RuntimeError as error:
        raise BadInput(str(error)) from error
    finally:
        await pool.close()


def _require_usable(workload: Workload, fault: str | None, device: str) -> None:
    if not fault:
        return
    which = f"task {workload.task.name}" + (f" ({workload.name})" if workload.name else "")
    fault = " ".join(fault.split())
    if any(sign in fault for sign in _MEMORY_SIGNS):
        raise BadInput(f"{which}: its inputs and results don't fit the memory of {device}: {fault}"[:500])
    raise BadInput(f"{which}: {fault}")


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


def require_profiler(profile: str, parameters: Path = DRIVER_PARAMETERS, flag: str = "--profile-tool") -> None:
    """A tool that was asked for by name must be there, and allowed. Raises BadInput; "auto" takes what works."""
    if profile and profile not in CHOICES:
        raise BadInput(f"{flag} {profile}: use one of {', '.join(CHOICES)}")
    if profile != Tool.NCU:
        return
    from .profile import ncu

    try:
        ncu.find_ncu()
    except ProfileError as error:
        raise BadInput(f"{flag} ncu: {error}") from error
    restricted = parameters.is_file() and "RmProfilingAdminOnly: 1" in parameters.read_text()
    if restricted and os.geteuid() != 0:
        raise BadInput(
            f"{flag} ncu: no permission to read the GPU's counters (ERR_NVGPUCTRPERM), they are root's: "
            "run as root, load nvidia with NVreg_RestrictProfilingToAdminUsers=0, or profile with cupti"
        )


def _candidate(path: Path, loaded: LoadedTask, limits: EvaluationLimits) -> Given:
    source = _read_candidate(path, limits)
    form = detect_form(source)
    if form in NEED_NVCC and find_nvcc() is None:
        raise BadInput(
            f"{path}: a candidate of form {form} needs nvcc, and there is none: pip install nvidia-cuda-nvcc"
        )
    name = path.stem
    if form.startswith("solution/"):
        if loaded.definition is None:
            raise BadInput(f"{path}: a FlashInfer Solution needs a FlashInfer Trace task; {loaded.path} is none")
        from .tasks.flashinfer import check_solution

        name = check_solution(source, loaded.name, path)
    return Given(path, Candidate(source), name)


def _read_candidate(path: Path, limits: EvaluationLimits) -> str:
    text = _read(path, limits)
    if path.suffix != ".md":
        return text
    source = extract_candidate(text)
    if source is None:
        raise BadInput(f"{path}: no fenced module in this answer")
    return source


def _read(path: Path, limits: EvaluationLimits) -> str:
    try:
        return read_text(path, limits.source_bytes)
    except TaskError as error:
        raise BadInput(str(error)) from None


def _write_traces(path: Path, loaded: LoadedTask, named: list[Given], judged: list[Judged], device: str) -> None:
    from .tasks.flashinfer import append_traces, make_trace

    machine = describe_machine()
    hardware = machine["gpu_names"][int(device.partition(":")[2] or 0)] if device != "cpu" else machine["cpu"]
    libs = {name: metadata.version(name) for name in ("torch", "triton") if _installed(name)}
    names = {given.path: given.name for given in named}
    workloads = {workload.name: workload for workload in loaded.workloads}
    append_traces(
        path,
        [make_trace(loaded, workloads[one.workload], names[one.path], one.verdict, hardware, libs) for one in judged],
    )


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
