"""Verdicts a minute: a pool that is up against a loop of fresh processes, over the same answers."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.evaluation_figures import per_minute
from specgen_engine.evaluation.base import Candidate, Status

if TYPE_CHECKING:
    from bench.evaluation import Answer, Record


async def throughput(answers: list[Answer], args: argparse.Namespace, record: Record) -> None:
    """The pool for either kind, then both loops at once, a process each: they are slow, and leave the host idle.

    Each rate is what its own seconds had, extrapolated to a minute. The pool's verdicts are rows; an answer's second
    one is not.
    """
    from bench.evaluation import spread_out

    rates: dict[str, Any] = record.run.setdefault("throughput", {})
    chosen: dict[str, list[Answer]] = {}
    plan = (("triton", args.light_workers, args.rate_s), ("cuda", args.workers, args.cuda_rate_s))
    for kind, workers, seconds in plan:
        mine = spread_out([answer for answer in answers if answer.kind == kind])
        if mine:
            chosen[kind] = list(itertools.islice(itertools.cycle(mine), args.throughput))
            rates[kind] = {"distinct": min(len(mine), args.throughput)}
            rates[kind]["pool"] = await pool_rate(f"rate-{kind}", chosen[kind], args, workers, seconds, record)
            record.save()
            print(kind, json.dumps(rates[kind]), flush=True)
    begun = asyncio.get_running_loop().create_task
    loops = [begun(asyncio.to_thread(fresh_rate, some, args.device, args.fresh_s)) for some in chosen.values()]
    for kind, loop in zip(chosen, loops, strict=True):
        rates[kind]["fresh_processes"] = await loop | {"beside_another_loop": len(chosen) > 1}
        record.save()
        print(kind, json.dumps(rates[kind]), flush=True)


async def pool_rate(
    name: str, answers: list[Answer], args: argparse.Namespace, workers: int, seconds: float, record: Record
) -> dict[str, Any]:
    """Each text is its own, so that nothing comes from a cache."""
    from bench.evaluation import line, new_pool, row_of

    pool = new_pool(args, workers)
    await pool.start()
    while pool.snapshot()["ready"] != workers:  # noqa: ASYNC110  (not their start's speed but the workers' is wanted)
        await asyncio.sleep(0.1)
    start = time.monotonic()
    ends: list[tuple[float, str]] = []
    seen: set[str] = set()

    async def one(number: int, answer: Answer) -> None:
        first = answer.name not in seen
        seen.add(answer.name)
        candidate = answer.candidate if first else Candidate(f"{answer.candidate.source}\n# {number}\n")
        verdict = await pool.submit(answer.task, candidate, search=name).verdict()
        if verdict.status == Status.CANCELLED:
            return
        passed = time.monotonic() - start
        ends.append((passed, str(verdict.status)))
        if first:
            record.add(row_of(name, answer, verdict, passed))
            print(line(record.rows[-1]), flush=True)

    cancel = asyncio.get_running_loop().call_later(seconds, pool.cancel_search, name)
    try:
        await asyncio.gather(*(one(*pair) for pair in enumerate(answers)))
    finally:
        cancel.cancel()
        await pool.close()
    done = len(ends) == len(answers)
    spent = max((passed for passed, _ in ends), default=0.0) if done else seconds
    found = {"verdicts": len(ends), "of": len(answers), "seconds": round(spent, 1), "workers": workers}
    return found | per_minute(len(ends), spent, [status for _, status in ends]) | {"cut_off": not done}


def fresh_rate(answers: list[Answer], device: str, seconds: float) -> dict[str, Any]:
    """The same in a loop of fresh processes (bench/fresh_process.py); none is begun after so many seconds."""
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
                [sys.executable, "-m", "bench.fresh_process", *map(str, paths), device],
                capture_output=True, text=True, env={**os.environ, **caches},
            )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        statuses.append(json.loads(lines[-1])["status"] if done.returncode == 0 and lines else "crash")
    spent = time.monotonic() - start
    found = {"verdicts": len(statuses), "of": len(answers), "seconds": round(spent, 1)}
    return found | per_minute(len(statuses), spent, statuses) | {"cut_off": len(statuses) < len(answers)}
