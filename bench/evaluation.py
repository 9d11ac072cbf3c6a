"""Verdicts of recorded answers on a GPU, beside the scores that another harness gave them.

    python -m bench.evaluation TRACES --scores TRACES/scores.json --json F [--device cuda:0] [--resume OLD]
    python -m bench.evaluation TRACES --scores TRACES/scores.json --json F --throughput 60
    python -m bench.evaluation TRACES --scores TRACES/scores.json --json F --twice 30
    python -m bench.evaluation --scores TRACES/scores.json --summarise F

Answers in Triton or PyTorch run first, then those that compile CUDA C++. F is written after every verdict; what it, or
OLD, has a row of is not judged again. --throughput judges so many of each kind in a pool that is up, each with its row,
and then some of them in loops of fresh processes. --twice judges so many that the scores call correct in one pool and,
after its end, in another; those in C++ come last, so that the others are timed beside no compilation in either pass.
Figures follow from the rows (--summarise: from those of a run that was cut off). Times are from text to verdict without
what was spent in the queue and in waiting for the GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evaluation_figures import KINDS, summary
from bench.machine import new_report, write_report
from bench.service_times import kind_of
from specgen_engine.controller.answers import extract_candidate
from specgen_engine.evaluation.base import Candidate, Status, Task, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool

SCHEMA = "specgen.verdicts/1"
STRIDE = 7
CORES_A_WORKER = 4
"""Its judge, its candidate, the spares that start and what those compile."""
FIRST_SHARE = 0.6
"""Of the time of two runs, the first's: it has what compiles."""


@dataclass(frozen=True)
class Answer:
    """name: path below the traces folder. kind: by what its module imports."""

    name: str
    task: Task
    candidate: Candidate
    kind: str


def read_answers(traces: Path, only: str, device: str = "cuda") -> list[Answer]:
    """Every fork-N.md and final.md of an iteration, by task; those for the device whose name matches `only`."""
    found = []
    for path in sorted(traces.glob("*/*/iter-*/f*.md")):
        name, folder = str(path.relative_to(traces)), path.parent.parent
        source = extract_candidate(path.read_text())
        for_cpu, on_cpu = "cpu" in folder.name, device == "cpu"
        if source is None or for_cpu != on_cpu or not re.search(only, name):
            continue
        kind = kind_of(source)
        task = Task((folder / "task.py").read_text(), folder.name)
        found.append(Answer(name, task, Candidate(source), kind))
    return found


class Record:
    """The report on disk: rows so far, each with the number of the run it is from; written after every change."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = args.json
        self.report = _read(args.json) or _read(args.resume) or {"schema": SCHEMA, "runs": [], "verdicts": []}
        if "runs" not in self.report:  # as these reports were before they held several runs
            head = ("machine", "command", "commit", "device", "note", "compile_s", "storm", "throughput")
            first = {key: self.report.pop(key) for key in head if key in self.report}
            rows = [{"pass": row["kind"]} | row | {"run": 0} for row in self.report["verdicts"]]
            self.report = {"schema": SCHEMA, "runs": [first], "verdicts": rows}
        fresh = new_report(SCHEMA, None, "bench.evaluation") | {"device": args.device}
        if not args.label or self.report["runs"][-1:] == [] or self.report["runs"][-1].get("label") != args.label:
            self.report["runs"].append(fresh | {"label": args.label, "commands": []})
        self.run = self.report["runs"][-1]
        self.run["commands"].append(fresh["command"])
        self.number = len(self.report["runs"]) - 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.report["verdicts"]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | {"run": self.number})
        self.save()

    def save(self) -> None:
        write_report(self.path, self.report)

    def finish(self, scores: dict[str, Any]) -> dict[str, Any]:
        self.rows.sort(key=lambda row: (row["candidate"], row["run"], row["pass"]))
        self.report |= {"scores_machine": scores["machine"]} | summary(self.rows, scores["answers"])
        self.save()
        return self.report


def _read(path: Path | None) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def row_of(name: str, answer: Answer, verdict: Verdict, seconds: float) -> dict[str, Any]:
    stages = {str(stage): value for stage, value in verdict.stages.items()}
    return {
        "candidate": answer.name,
        "pass": name,
        "kind": answer.kind,
        "status": str(verdict.status),
        "speedup": verdict.speedup,
        "interval": verdict.interval,
        "candidate_ms": verdict.candidate_ms,
        "reference_ms": verdict.reference_ms,
        "reason": verdict.reason,
        "digest": verdict.digest[:400],
        "sandbox": verdict.sandbox,
        "stages": stages,
        "verdict_s": round(seconds - stages.get("queued", 0.0), 3),
        "own_s": verdict.own_s,
        "overhead": verdict.overhead,
        "extra_ms": verdict.extra_ms,
        "conditions": verdict.conditions,
    }


def line(row: dict[str, Any]) -> str:
    figure = f"{row['speedup']:.3f}x {row['interval']}" if row["speedup"] else f"{row['reason']} | {row['digest']}"
    stages = " ".join(f"{name[:2]} {seconds:.2f}" for name, seconds in row["stages"].items())
    name = row["candidate"].replace("/iter-1", "")
    return f"  {name} {row['kind']} {row['status']} {figure[:260]} [{row['verdict_s']:.2f} s: {stages}]"


def new_pool(args: argparse.Namespace, workers: int) -> LocalPool:
    return LocalPool(
        workers=workers, device=args.device, limits=EvaluationLimits(sandbox=args.sandbox), cache=args.cache
    )


async def run_pass(
    name: str, answers: list[Answer], args: argparse.Namespace, workers: int, record: Record, *, apart: bool = False
) -> None:
    """A row of each answer; what has no verdict when time is over has none. apart: those in C++ after all others."""
    pool = new_pool(args, workers)
    started = time.monotonic()
    await pool.start()
    print(f"{name}: {len(answers)} answers, first of {workers} workers ready in {time.monotonic() - started:.1f} s")

    async def one(answer: Answer) -> None:
        began = time.monotonic()
        verdict = await pool.submit(answer.task, answer.candidate, search=name).verdict()
        if verdict.status != Status.CANCELLED:
            record.add(row_of(name, answer, verdict, time.monotonic() - began))
            print(line(record.rows[-1]), flush=True)

    cancel = asyncio.get_running_loop().call_later(max(0.0, args.ends - started), pool.cancel_search, name)
    try:
        for some in parted(answers) if apart else [answers]:
            if time.monotonic() < args.ends:
                await asyncio.gather(*(one(answer) for answer in some))
    finally:
        cancel.cancel()
        snapshot = pool.snapshot()
        await pool.close()
    wall = time.monotonic() - started
    print(f"{name}: {wall:.1f} s, sandbox {snapshot['sandbox']}, restarts {snapshot['restarts']}", flush=True)


async def judge(answers: list[Answer], args: argparse.Namespace, record: Record) -> None:
    judged = {row["candidate"] for row in record.rows}
    todo = [answer for answer in answers if answer.name not in judged]
    light, heavy = parted(todo)
    if light:
        await run_pass("light", light, args, args.light_workers, record)
    if heavy:
        await run_pass("compiling", heavy, args, args.workers, record)


async def judge_twice(answers: list[Answer], scores: dict[str, Any], args: argparse.Namespace, record: Record) -> None:
    """Two pools one after the other, the second with the first's builds; what the first can't do in time is in none."""
    said = {name: score["status"] for name, score in scores.items()}
    correct = [answer for answer in answers if said.get(answer.name, Status.CORRECT) == Status.CORRECT]
    light, cuda = map(spread_out, parted(correct))
    cuda = cuda[: args.twice // 3]
    chosen = light[: args.twice - len(cuda)] + cuda
    workers = at_most(args.light_workers, cores())
    ends = args.ends
    args.ends = time.monotonic() + FIRST_SHARE * (ends - time.monotonic())
    await run_pass("twice-1", chosen, args, workers, record, apart=True)
    judged = {row["candidate"] for row in record.rows if row["run"] == record.number and row["pass"] == "twice-1"}
    args.ends = ends
    await run_pass("twice-2", [one for one in chosen if one.name in judged], args, workers, record, apart=True)


def parted(answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Those that need no C++ compiler, and those that do."""
    return [one for one in answers if one.kind != "cuda"], [one for one in answers if one.kind == "cuda"]


def at_most(workers: int, cores: int) -> int:
    """So few that an evaluation's processes and those beside it find a core: a reference that launches for milliseconds
    took 9.3 and 4.1 ms in two passes of 12 workers on 16 cores, and 3.2 with 4."""
    return max(1, min(workers, cores // CORES_A_WORKER))


def cores() -> int:
    return len(os.sched_getaffinity(0))


def spread_out(answers: list[Answer]) -> list[Answer]:
    """Every seventh first, so that those which are reached are of all tasks."""
    return [answers[at] for start in range(STRIDE) for at in range(start, len(answers), STRIDE)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    answers = read_answers(args.traces, args.only, args.device)
    answers = [answer for answer in answers if answer.kind in args.kinds.split(",")]
    scores = json.loads(args.scores.read_text())
    record = Record(args)
    args.ends = time.monotonic() + args.budget_s
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        args.cache = args.builds or Path(cache)
        if args.throughput:
            from bench.evaluation_rate import throughput

            asyncio.run(throughput(answers, args, record))
        elif args.twice:
            asyncio.run(judge_twice(answers, scores["answers"], args, record))
        else:
            asyncio.run(judge(answers, args, record))
    return record.finish(scores)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, nargs="?")
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", type=Path, help="a report whose rows are kept, where --json does not exist yet")
    parser.add_argument("--summarise", type=Path, metavar="F", help="only work out F's figures from its rows")
    parser.add_argument("--label", default="", help="commands one after another with the same are one run in F")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="", help="regular expression on an answer's path")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--light-workers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--throughput", type=int, default=0, help="verdicts a minute over so many of each kind")
    parser.add_argument("--rate-s", type=float, default=60.0, help="with --throughput: at most so long in the pool")
    parser.add_argument("--cuda-rate-s", type=float, default=60.0, help="the same for CUDA C++, which compiles")
    parser.add_argument("--fresh-s", type=float, default=60.0, help="the same for the loops of fresh processes")
    parser.add_argument("--twice", type=int, default=0, metavar="N", help="two runs of N answers, a third CUDA C++")
    parser.add_argument("--builds", type=Path, help="a folder that keeps builds from one command to the next")
    parser.add_argument("--sandbox", default="prefer")
    parser.add_argument("--budget-s", type=float, default=300.0)
    args = parser.parse_args()
    if args.summarise is None and (args.traces is None or args.json is None):
        parser.error("TRACES and --json are needed, or --summarise F")
    return args


def main() -> int:
    args = parse()
    if args.summarise:
        report, scores = json.loads(args.summarise.read_text()), json.loads(args.scores.read_text())
        report |= summary(report["verdicts"], scores["answers"])
        write_report(args.summarise, report)
    else:
        report = measure(args)
    brief = {key: report[key] for key in ("comparison", "latency") if key in report}
    two = report.get("two_runs") or {}
    brief["two_runs"] = {key: value for key, value in two.items() if key != "kernels"}
    brief["runs"] = len(report["runs"])
    brief["throughput"] = report["runs"][-1].get("throughput")
    print(json.dumps(brief, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
