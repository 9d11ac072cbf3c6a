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

FRESH_STRIDE = 7
"""The loop of fresh processes takes every seventh answer first, so that those it gets to are of all tasks."""


async def throughput(answers: list[Answer], args: argparse.Namespace, record: Record) -> None:
    """For both kinds: the pool, then the loop. The pool's verdicts are rows; an answer's second one is not."""
    rates: dict[str, Any] = record.run.setdefault("throughput", {})
    for kind, workers in (("triton", args.light_workers), ("cuda", args.workers)):
        mine = [answer for answer in answers if answer.kind == kind]
        chosen = list(itertools.islice(itertools.cycle(mine), args.throughput)) if mine else []
        if chosen:
            rates[kind] = {"distinct": min(len(mine), len(chosen))}
            rates[kind]["pool"] = await pool_rate(f"rate-{kind}", chosen, args, workers, record)
            record.save()
            spread_out = [chosen[at] for start in range(FRESH_STRIDE) for at in range(start, len(chosen), FRESH_STRIDE)]
            rates[kind]["fresh_processes"] = fresh_rate(spread_out, args.device, args.fresh_s)
            record.save()
            print(kind, json.dumps(rates[kind]), flush=True)


async def pool_rate(
    name: str, answers: list[Answer], args: argparse.Namespace, workers: int, record: Record
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
        seconds = time.monotonic() - start
        ends.append((seconds, str(verdict.status)))
        if first:
            record.add(row_of(name, answer, verdict, seconds))
            print(line(record.rows[-1]), flush=True)

    cancel = asyncio.get_running_loop().call_later(args.rate_s, pool.cancel_search, name)
    try:
        await asyncio.gather(*(one(*pair) for pair in enumerate(answers)))
    finally:
        cancel.cancel()
        await pool.close()
    last = max((seconds for seconds, _ in ends), default=0.0)
    statuses = [status for _, status in ends]
    found = {"verdicts": len(ends), "of": len(answers), "seconds": round(last, 1), "workers": workers}
    return found | per_minute(len(ends), last, statuses)


def fresh_rate(answers: list[Answer], device: str, seconds: float) -> dict[str, Any]:
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
                [sys.executable, "-m", "bench.fresh_process", *map(str, paths), device],
                capture_output=True, text=True, env={**os.environ, **caches},
            )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        statuses.append(json.loads(lines[-1])["status"] if done.returncode == 0 and lines else "crash")
    spent = time.monotonic() - start
    found = {"verdicts": len(statuses), "of": len(answers), "seconds": round(spent, 1)}
    return found | per_minute(len(statuses), spent, statuses)
