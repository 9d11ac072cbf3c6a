"""Verdicts of recorded answers on a GPU, beside the scores that another harness gave them.

    python -m bench.evaluation TRACES --scores TRACES/scores.json --json F [--device cuda:0]

Answers in Triton or PyTorch run first, with few workers and the CPU at rest; then those that compile CUDA C++, many
side by side. Between them some correct answers run again, for the spread of a speed-up between two runs.
Times are from text to verdict without what was spent in the queue and in waiting for the GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import new_report, write_report
from specgen_engine.controller.answers import extract_candidate
from specgen_engine.evaluation.base import Candidate, Status, Task, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool

KINDS = ("triton", "torch", "cuda")


@dataclass(frozen=True)
class Answer:
    """name: path below the traces folder. kind: by what its module imports."""

    name: str
    task: Task
    candidate: Candidate
    kind: str


def read_answers(traces: Path, only: str) -> list[Answer]:
    """Every fork-N.md and final.md of an iteration, by task; those whose name matches `only`."""
    found = []
    for path in sorted(traces.glob("*/*/iter-*/f*.md")):
        name, folder = str(path.relative_to(traces)), path.parent.parent
        source = extract_candidate(path.read_text())
        if source is None or "cpu" in folder.name or not re.search(only, name):
            continue
        kind = "cuda" if "load_inline" in source else "triton" if "import triton" in source else "torch"
        task = Task((folder / "task.py").read_text(), folder.name)
        found.append(Answer(name, task, Candidate(source), kind))
    return found


async def run_pass(name: str, answers: list[Answer], args: argparse.Namespace, workers: int, ends: float) -> list[dict]:
    """Rows of one pass; what has no verdict when time is over is reported as cancelled."""
    pool = LocalPool(
        workers=workers, device=args.device, limits=EvaluationLimits(sandbox=args.sandbox), cache=args.cache
    )
    started = time.monotonic()
    await pool.start()
    print(f"{name}: {len(answers)} answers, first of {workers} workers ready in {time.monotonic() - started:.1f} s")
    rows: list[dict] = []

    async def one(answer: Answer) -> None:
        began = time.monotonic()
        verdict = await pool.submit(answer.task, answer.candidate, search=name).verdict()
        rows.append(row(name, answer, verdict, time.monotonic() - began))
        print(line(rows[-1]), flush=True)

    cancel = asyncio.get_running_loop().call_later(max(0.0, ends - time.monotonic()), pool.cancel_search, name)
    try:
        await asyncio.gather(*(one(answer) for answer in answers))
    finally:
        cancel.cancel()
        snapshot = pool.snapshot()
        await pool.close()
    wall = time.monotonic() - started
    print(f"{name}: {wall:.1f} s, sandbox {snapshot['sandbox']}, restarts {snapshot['restarts']}", flush=True)
    return rows


def row(name: str, answer: Answer, verdict: Verdict, seconds: float) -> dict[str, Any]:
    stages = {str(stage): value for stage, value in verdict.stages.items()}
    total = seconds - stages.get("queued", 0.0)
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
        "verdict_s": round(total, 3),
        "overhead_s": round(total - verdict.own_s, 3),
        "overhead": verdict.overhead,
        "extra_ms": verdict.extra_ms,
        "conditions": verdict.conditions,
    }


def line(row: dict[str, Any]) -> str:
    figure = f"{row['speedup']:.3f}x {row['interval']}" if row["speedup"] else f"{row['reason']} | {row['digest']}"
    stages = " ".join(f"{name[:2]} {seconds:.2f}" for name, seconds in row["stages"].items())
    name = row["candidate"].replace("/iter-1", "")
    return f"  {name} {row['kind']} {row['status']} {figure[:260]} [{row['verdict_s']:.2f} s: {stages}]"


def percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {f"p{share}": ordered[min(len(ordered) - 1, int(share * len(ordered) / 100))] for share in (50, 95)}
    return {"n": len(ordered)} | {key: round(value, 3) for key, value in at.items()}


def compare(rows: list[dict], scores: dict[str, Any]) -> dict[str, Any]:
    """Statuses that differ from the scores, one by one; spread of ours / theirs over the speed-ups."""
    known = [(row, scores[row["candidate"]]) for row in rows if row["candidate"] in scores]
    ran = [(row, score) for row, score in known if row["status"] != Status.CANCELLED]
    for row, score in known:
        row["score"] = {"status": score["status"], "speedup": score.get("speedup"), "ms": score.get("ms")}
        if row["speedup"] and score.get("speedup"):
            row["ratio"] = round(row["speedup"] / score["speedup"], 3)
    both = [row for row, _ in ran if "ratio" in row]
    ratios = [row["ratio"] for row in both]
    times = [row["candidate_ms"] / row["score"]["ms"] for row in both]
    return {
        "scored": len(scores),
        "ran": len(ran),
        "equal_status": sum(row["status"] == score["status"] for row, score in ran),
        "differences": [
            {"candidate": row["candidate"], "ours": row["status"], "scores": score["status"], "reason": row["reason"]}
            for row, score in ran
            if row["status"] != score["status"]
        ],
        "speedup_ratio": spread(ratios),
        "speedup_within_10_percent": sum(abs(ratio - 1) <= 0.1 for ratio in ratios),
        "candidate_ms_ratio": spread(times),
    }


def spread(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    figures = {"min": min(values), "p5": cuts[0], "p50": statistics.median(values), "p95": cuts[-1], "max": max(values)}
    return {"n": len(values)} | {key: round(value, 3) for key, value in figures.items()}


def latency(rows: list[dict]) -> dict[str, Any]:
    """Seconds from text to verdict by kind, the same without compiling, and the harness's own share."""
    done = [row for row in rows if row["status"] != Status.CANCELLED]
    figures: dict[str, Any] = {}
    for kind in KINDS:
        mine = [row for row in done if row["kind"] == kind]
        correct = [row for row in mine if row["status"] == Status.CORRECT]
        figures[kind] = {
            "verdict_s": percentiles([row["verdict_s"] for row in mine]),
            "verdict_s_without_compile_stage": percentiles(
                [row["verdict_s"] - row["stages"].get("compile", 0.0) for row in mine]
            ),
            "overhead_s_of_correct": percentiles([row["overhead_s"] for row in correct]),
            "overhead_s_by_step_of_correct": by_step(correct),
        }
    return figures


def by_step(rows: list[dict]) -> dict[str, Any]:
    """The harness's own time by step, the largest median first."""
    names = {name for row in rows for name in row["overhead"]}
    found = {name: percentiles([row["overhead"].get(name, 0.0) for row in rows]) for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]["p50"] if item[1] else 0.0))


def repeats(first: list[dict], second: list[dict]) -> dict[str, Any]:
    """How far two runs of the same answers agree: share whose intervals overlap, and |a - b| / mean."""
    before = {row["candidate"]: row for row in first}
    pairs = [
        (before[row["candidate"]], row) for row in second if row["speedup"] and before[row["candidate"]]["speedup"]
    ]
    apart = [abs(a["speedup"] - b["speedup"]) / ((a["speedup"] + b["speedup"]) / 2) for a, b in pairs]
    overlap = sum(a["interval"][0] <= b["interval"][1] and b["interval"][0] <= a["interval"][1] for a, b in pairs)
    kernels = {
        a["candidate"]: {
            "speedups": [a["speedup"], b["speedup"]],
            "cv": round(variation(a["speedup"], b["speedup"]), 4),
        }
        for a, b in pairs
    }
    return {
        "pairs": len(pairs),
        "intervals_overlap": overlap,
        "relative_difference": spread(apart),
        "cv": spread([variation(a["speedup"], b["speedup"]) for a, b in pairs]),
        "kernels": kernels,
    }


def variation(a: float, b: float) -> float:
    """Coefficient of variation of two figures: sample standard deviation over mean."""
    return statistics.stdev((a, b)) / statistics.mean((a, b))


async def pool_rate(name: str, answers: list[Answer], args: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Verdicts a minute of a pool that is up; each text is its own, so that nothing comes from a cache."""
    pool = LocalPool(
        workers=workers, device=args.device, limits=EvaluationLimits(sandbox=args.sandbox), cache=args.cache
    )
    await pool.start()
    while pool.snapshot()["ready"] != workers:  # noqa: ASYNC110  (not their start's speed but the workers' is wanted)
        await asyncio.sleep(0.1)
    start = time.monotonic()
    ends: list[float] = []

    async def one(number: int, answer: Answer) -> Verdict:
        candidate = Candidate(f"{answer.candidate.source}\n# {name} {number}\n")
        verdict = await pool.submit(answer.task, candidate, search=name).verdict()
        ends.append(time.monotonic() - start)
        return verdict

    cancel = asyncio.get_running_loop().call_later(args.rate_s, pool.cancel_search, name)
    try:
        verdicts = await asyncio.gather(*(one(*pair) for pair in enumerate(answers)))
    finally:
        cancel.cancel()
        await pool.close()
    ran = [verdict for verdict in verdicts if verdict.status != Status.CANCELLED]
    last = max(ends[: len(ran)], default=0.0) if len(ran) < len(verdicts) else max(ends)
    return {"verdicts": len(ran), "of": len(verdicts), "seconds": round(last, 1), "workers": workers} | per_minute(
        len(ran), last, [str(verdict.status) for verdict in ran]
    )


def per_minute(count: int, seconds: float, statuses: list[str]) -> dict[str, Any]:
    return {
        "verdicts_per_minute": round(60 * count / seconds, 1) if seconds else None,
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
    }


def fresh_rate(answers: list[Answer], args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The same in a loop of fresh processes (bench/fresh_process.py), as many as fit the time."""
    start, statuses = time.monotonic(), []
    for answer in answers:
        if time.monotonic() - start > seconds:
            break
        with tempfile.TemporaryDirectory(prefix="specgen-fresh-") as folder:
            paths = [Path(folder) / "task.py", Path(folder) / "candidate.py"]
            for path, text in zip(paths, (answer.task.source, answer.candidate.source), strict=True):
                path.write_text(text)
            caches = {"TORCH_EXTENSIONS_DIR": folder, "TRITON_CACHE_DIR": folder}
            done = subprocess.run(
                [sys.executable, "-m", "bench.fresh_process", *map(str, paths), args.device],
                capture_output=True, text=True, env={**os.environ, **caches},
            )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        statuses.append(json.loads(lines[-1])["status"] if done.returncode == 0 and lines else "crash")
    spent = time.monotonic() - start
    return {"verdicts": len(statuses), "of": len(answers), "seconds": round(spent, 1)} | per_minute(
        len(statuses), spent, statuses
    )


async def throughput(answers: list[Answer], args: argparse.Namespace) -> dict[str, Any]:
    """A warm pool against a loop of fresh processes, for both kinds of answers, in one run."""
    found: dict[str, Any] = {}
    for kind, workers in (("triton", args.light_workers), ("cuda", args.workers)):
        mine = [answer for answer in answers if answer.kind == kind]
        chosen = list(itertools.islice(itertools.cycle(mine), args.throughput)) if mine else []
        if chosen:
            pool = await pool_rate(f"rate-{kind}", chosen, args, workers)
            found[kind] = {"pool": pool, "fresh_processes": fresh_rate(chosen, args, args.fresh_s)}
            print(kind, json.dumps(found[kind]), flush=True)
    return found


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    answers = [answer for answer in read_answers(args.traces, args.only) if answer.kind in args.kinds.split(",")]
    if args.throughput:
        return {"throughput": await throughput(answers, args)}
    scores = json.loads(args.scores.read_text())
    ends = time.monotonic() + args.budget_s
    light = [answer for answer in answers if answer.kind != "cuda"]
    heavy = [answer for answer in answers if answer.kind == "cuda"]
    rows = await run_pass("light", light, args, args.light_workers, ends) if light else []
    again: list[dict] = []
    if args.repeat:
        correct = {row["candidate"] for row in rows if row["status"] == Status.CORRECT}
        chosen = [answer for answer in light if answer.name in correct][:: max(1, len(correct) // args.repeat)]
        chosen = chosen[: args.repeat]
        again = await run_pass("repeat", chosen, args, args.light_workers, ends) if chosen else []
    if heavy:
        rows += await run_pass("compiling", heavy, args, args.workers, ends)
    return {
        "scores_machine": scores["machine"],
        "comparison": compare(rows, scores["answers"]),
        "latency": latency(rows),
        "two_runs": repeats(rows, again) if again else None,
        "verdicts": sorted(rows, key=lambda row: row["candidate"]),
        "repeat_verdicts": [{key: row[key] for key in ("candidate", "status", "speedup", "interval")} for row in again],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="", help="regular expression on an answer's path")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--light-workers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=0, help="how many correct answers are run a second time")
    parser.add_argument(
        "--throughput", type=int, default=0, help="instead: verdicts a minute over so many of each kind"
    )
    parser.add_argument("--rate-s", type=float, default=60.0, help="with --throughput: at most so long for one kind")
    parser.add_argument("--fresh-s", type=float, default=60.0, help="the same for the loop of fresh processes")
    parser.add_argument("--sandbox", default="prefer")
    parser.add_argument("--budget-s", type=float, default=300.0)
    args = parser.parse_args()
    report = new_report("specgen.verdicts/1", None, "bench.evaluation")
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        args.cache = Path(cache)
        report |= {"device": args.device} | asyncio.run(measure(args))
    write_report(args.json, report)
    brief = {key: report[key] for key in ("comparison", "latency", "two_runs", "throughput") if key in report}
    print(json.dumps(brief, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
