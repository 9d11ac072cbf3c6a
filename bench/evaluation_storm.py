"""Evaluations of which every fifth hangs, crashes, runs out of memory, forks without end or is killed from outside.

    python -m bench.evaluation_storm --json F [--evaluations 500] [--device cpu] [--workers 1] [--seconds S]

Shows that every job gets its verdict, that no process is left, that the next job after a hang runs soon, and (on a
GPU) that its memory is what it was. After S seconds none is begun any more; the report says how many were. What is
killed from outside is any process of any worker's, so with several workers an honest candidate's is, too: it is to be
judged again, which the report counts. --faults kill,hang draws from these alone. What an honest evaluation spends, and
how long the device is timed on and is not in between, is in the report: it says what bounds the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.evaluation_figures import by_step, percentiles
from bench.machine import new_report, write_report
from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict
from specgen_engine.evaluation.gpulock import name_of_gpu
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.evaluation.warm import SOURCE
from specgen_engine.pools.local import LocalPool

TASK = Task(
    "import torch\n"
    "class Model(torch.nn.Module):\n"
    "    def forward(self, x):\n"
    "        return torch.softmax(x, -1)\n"
    "def get_inputs():\n"
    "    return [torch.randn(256, 512)]\n"
    "def get_init_inputs():\n"
    "    return []\n",
    "storm",
)
HEAD = "import ctypes, os, time, torch\n"
HEAD_ON_GPU = f"{HEAD}import triton\n"
"""As most candidates there do: the next one's CUDA context is made beside this one's check, as for any of them."""
CLASS = "class ModelNew(torch.nn.Module):\n    def forward(self, x):\n        "
GOOD = "return torch.softmax(x, -1)"
SPIN = (
    "import triton, triton.language as tl\n"
    "@triton.jit\n"
    "def _spin(flag):\n"
    "    while tl.load(flag, volatile=True) == 0:\n"
    "        pass\n"
)
FAULTS: dict[str, tuple[str, frozenset[Status]]] = {
    "hang": ("while True: pass", frozenset({Status.TIMEOUT})),
    "crash": ("ctypes.string_at(0)", frozenset({Status.CRASH})),
    "memory": ("return torch.ones(1 << 40, device=x.device)", frozenset({Status.RUNTIME_ERROR})),
    "fork bomb": ("\n        while True: os.fork()", frozenset({Status.RUNTIME_ERROR, Status.TIMEOUT, Status.CRASH})),
    "kill": (GOOD, frozenset({Status.CORRECT, Status.CRASH})),
}
GPU_HANG = "flag = torch.zeros(1, device=x.device); _spin[(1,)](flag); return x"


@dataclass
class Seen:
    """next_after_hang: seconds from a hang's verdict until the next job had the device, of several workers for timing.

    begun: how many were submitted. killed: from outside, by kind. made_again: verdicts of a second try, after a kill.
    rows: of honest candidates, what their verdicts say of their seconds. timed: seconds from the start of a timing to
    its verdict. between: from there until the next timing. told: called after every verdict.
    """

    begun: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    next_after_hang: list[float] = field(default_factory=list)
    lost: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    made_again: int = 0
    rows: list[dict[str, dict[str, float]]] = field(default_factory=list)
    timed: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    freed_at: float | None = None
    told: Callable[[Seen], None] = lambda seen: None

    def timing_begins(self) -> float:
        now = time.monotonic()
        if self.freed_at is not None:
            self.between.append(round(now - self.freed_at, 4))
            self.freed_at = None
        return now

    def timing_ended(self, began: float) -> None:
        self.freed_at = time.monotonic()
        self.timed.append(round(self.freed_at - began, 4))


def candidate_of(number: int, fault: str, device: str) -> Candidate:
    """Each text is its own, so that nothing is remembered of another's."""
    on_gpu = device.startswith("cuda")
    body = FAULTS[fault][0] if fault else GOOD
    top = HEAD_ON_GPU if on_gpu else HEAD
    if fault == "hang" and on_gpu:
        body, top = GPU_HANG, HEAD + SPIN
    return Candidate(f"{top}# {number}\n{CLASS}{body}\n")


async def storm(
    pool: LocalPool,
    count: int,
    seed: int,
    at_once: int,
    kill_workers: bool,
    seconds: float = math.inf,
    told: Callable[[Seen], None] = lambda seen: None,
    kinds: Sequence[str] = tuple(FAULTS),
) -> Seen:
    """Submit count evaluations, at_once at a time; what each fifth does wrong, one of kinds, is drawn with the seed."""
    rng = random.Random(seed)
    seen = Seen(told=told)
    hung_at: dict[str, float] = {}
    ends = time.monotonic() + seconds
    device_is_taken = Stage.CHECK if at_once == 1 else Stage.TIME
    room = asyncio.Semaphore(at_once)
    faults = [rng.choice(kinds) if number % 5 == 4 else "" for number in range(count)]

    async def one(number: int, fault: str) -> None:
        async with room:
            if time.monotonic() > ends:
                return
            seen.begun += 1
            job = pool.submit(TASK, candidate_of(number, fault, str(pool.snapshot()["device"])), search="storm")
            killer = asyncio.create_task(_kill_when_running(job, rng, kill_workers, seen)) if fault == "kill" else None
            began: float | None = None
            async for stage in job.events():
                if stage is device_is_taken and "at" in hung_at:
                    seen.next_after_hang.append(round(time.monotonic() - hung_at.pop("at"), 3))
                if stage is Stage.TIME:
                    began = seen.timing_begins()
            verdict = await asyncio.wait_for(job.verdict(), 120)
            if began is not None:
                seen.timing_ended(began)
            if killer is not None:
                await killer
            _note(seen, number, fault, verdict)
            seen.told(seen)
            if fault == "hang":
                hung_at["at"] = time.monotonic()

    results = await asyncio.gather(*(one(*pair) for pair in enumerate(faults)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            seen.lost += 1
            seen.wrong.append(f"lost: {type(result).__name__}: {result}")
    return seen


def _note(seen: Seen, number: int, fault: str, verdict: Verdict) -> None:
    seen.statuses[f"{fault or 'good'}: {verdict.status}"] += 1
    seen.made_again += "made_again" in verdict.conditions
    if not fault and verdict.status == Status.CORRECT:
        stages = {str(stage): seconds for stage, seconds in verdict.stages.items()}
        seen.rows.append({"stages": stages, "overhead": verdict.overhead})
    if verdict.status not in (FAULTS[fault][1] if fault else {Status.CORRECT}):
        seen.wrong.append(f"{number} {fault or 'good'}: {verdict.status} {verdict.reason}"[:300])


async def _kill_when_running(job: Any, rng: random.Random, kill_workers: bool, seen: Seen) -> None:
    """SIGKILL a process picked at random: a candidate's, a judge's or a worker, of this job or of one beside it.

    Of this storm's workers only: those in its folder, which is where this process makes temporary files meanwhile.
    """
    async for stage in job.events():
        if stage in (Stage.COMPILE, Stage.CHECK, Stage.TIME):
            break
    else:
        return
    mine = f"{tempfile.gettempdir()}{os.sep}"
    try:
        workers = [one for one in psutil.Process().children() if f" {mine}" in _command(one)]
        below = [process for worker in workers for process in worker.children(recursive=True)]
        targets = (workers + below) if kill_workers else [one for one in below if "gpustate" not in _command(one)]
        target = rng.choice(targets)
        kind = "worker" if target in workers else _kind_of(target)
        target.send_signal(signal.SIGKILL)
    except (psutil.Error, OSError, IndexError):
        return
    seen.killed[kind] += 1


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def _kind_of(process: psutil.Process) -> str:
    """By its folder: judge, candidate, or spare for one that waits for a candidate."""
    folder = Path(process.cwd())
    kind = folder.name.partition("-")[0]
    if kind not in ("judge", "candidate"):
        return "other"
    return kind if (folder / SOURCE).exists() or kind == "judge" else "spare"


def left_over(folder: Path, patience_s: float = 5.0) -> list[str]:
    """Processes that still live in a folder of the storm's, once they have had time to go."""
    deadline = time.monotonic() + patience_s
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and os.readlink(f"/proc/{process.pid}/cwd").startswith(str(folder)):
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
            except (psutil.Error, OSError):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def gpu_memory_mib(device: str) -> int | None:
    """In use on a device, by anybody."""
    if not device.startswith("cuda"):
        return None
    query = ["nvidia-smi", "-i", name_of_gpu(device), "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())


def measure(
    count: int,
    device: str,
    workers: int,
    seed: int,
    *,
    kill_workers: bool = True,
    seconds: float = math.inf,
    told: Callable[[Seen], None] = lambda seen: None,
    kinds: Sequence[str] = tuple(FAULTS),
) -> dict[str, Any]:
    """The whole of it, in a folder of its own; asserts nothing."""
    limits = EvaluationLimits(
        check_s=2 if device.startswith("cuda") else 1,
        time_s=10,
        timing_budget_s=0.05,
        memory_bytes=2 << 30,
        processes=24,
    )
    with tempfile.TemporaryDirectory(prefix="specgen-storm-") as name:
        before, known = gpu_memory_mib(device), tempfile.tempdir
        tempfile.tempdir = name
        try:
            running = _run(count, device, workers, seed, limits, kill_workers, Path(name), seconds, told, kinds)
            seen, spent, restarts = asyncio.run(running)
        finally:
            tempfile.tempdir = known
        return {
            "evaluations": seen.begun,
            "workers": workers,
            "seconds": round(spent, 1),
            "verdicts": dict(sorted(seen.statuses.items())),
            "killed": dict(sorted(seen.killed.items())),
            "made_again": seen.made_again,
            "lost_jobs": seen.lost,
            "unexpected": seen.wrong,
            "worker_restarts": restarts,
            f"seconds_from_a_hang_to_the_next_{'check' if workers == 1 else 'timing'}": seen.next_after_hang,
            "seconds_of_an_honest_one": {
                "stages": by_step(seen.rows, "stages"),
                "overhead": by_step(seen.rows, "overhead"),
            },
            "seconds_timed": percentiles(seen.timed),
            "seconds_between_two_timings": percentiles(seen.between),
            "processes_left": left_over(Path(name)),
            "gpu_memory_mib": None if before is None else [before, gpu_memory_mib(device)],
        }


async def _run(
    count: int,
    device: str,
    workers: int,
    seed: int,
    limits: EvaluationLimits,
    kill_workers: bool,
    folder: Path,
    seconds: float,
    told: Callable[[Seen], None],
    kinds: Sequence[str],
) -> tuple[Seen, float, int]:
    pool = LocalPool(workers=workers, device=device, limits=limits, cache=folder / "builds")
    await pool.start()
    start = time.monotonic()
    try:
        seen = await storm(pool, count, seed, workers, kill_workers, seconds, told, kinds)
        return seen, time.monotonic() - start, int(str(pool.snapshot()["restarts"]))
    finally:
        await pool.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation_storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="none is begun after so long")
    parser.add_argument("--faults", default=",".join(FAULTS), help="those that are drawn from (all)")
    args = parser.parse_args()
    kinds = args.faults.split(",")
    if unknown := sorted(set(kinds) - set(FAULTS)):
        parser.error(f"--faults={args.faults}: {unknown[0]!r} is none of {', '.join(FAULTS)}")
    report = new_report("specgen.storm/1", args.seed, "bench.evaluation_storm")

    def save(seen: Seen) -> None:
        write_report(args.json, report | {"cut_off": True, "begun": seen.begun, "verdicts": dict(seen.statuses)})

    found = measure(
        args.evaluations, args.device, args.workers, args.seed, seconds=args.seconds, told=save, kinds=kinds
    )
    write_report(args.json, report | {"device": args.device} | found)
    print(found)
    return int(bool(found["lost_jobs"] or found["processes_left"]))


if __name__ == "__main__":
    sys.exit(main())
