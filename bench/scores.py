"""Scores of recorded answers, in the form of a traces folder's scores.json: judged by this project's own harness.

    python -m bench.scores TRACES --only glm51_runs --json F [--device cuda:0] [--budget-s 220]

Finals that need no C++ compiler come first, on an otherwise idle machine; then every other answer, those that compile
CUDA C++ beside the rest; then what was timed beside compilers once more, with the CPU at rest. The file is written
after every answer. A row: status, import_s, check_s, time_s (seconds without queueing), ref_ms, ms, speedup, interval,
why; beside_compilers: the speed-up of the first of two timings. What has no verdict when time is over has no row.
At last some CUDA C++ answers are built alone, for the time of a compiler on an idle machine (built_alone_s).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.evaluation import Answer, read_answers
from bench.machine import new_report, write_report
from specgen_engine.evaluation.base import Candidate, Status, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool

SCHEMA = "specgen.scores/1"
ALONE_S = 45.0
"""A build alone is begun while so much of the budget is left."""


class Batch(NamedTuple):
    """Answers that one pool judges, in their order."""

    answers: list[Answer]
    workers: int
    again: bool = False


def score_row(verdict: Verdict) -> dict[str, Any]:
    """Of one verdict; figures that it does not have are left out."""
    stages = {str(stage): seconds for stage, seconds in verdict.stages.items()}
    row: dict[str, Any] = {
        "status": str(verdict.status),
        "import_s": stages.get("compile", 0.0),
        "check_s": stages.get("check", 0.0),
        "time_s": stages.get("time", 0.0),
        "ref_ms": verdict.reference_ms,
        "ms": verdict.candidate_ms,
        "speedup": verdict.speedup,
        "interval": verdict.interval,
        "why": verdict.reason or None,
    }
    return {name: value for name, value in row.items() if value is not None}


def again_row(before: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """The second timing takes the first one's place; service times stay those of the first, which had no cache."""
    if verdict.status != Status.CORRECT:
        return before
    timed = {name: score_row(verdict)[name] for name in ("ref_ms", "ms", "speedup", "interval")}
    return {**before, **timed, "beside_compilers": before["speedup"]}


def in_order(answers: list[Answer]) -> list[Answer]:
    """By iteration, its final answer first."""

    def key(answer: Answer) -> tuple[str, int, bool, str]:
        folder, _, name = answer.name.rpartition("/")
        task, _, iteration = folder.rpartition("/iter-")
        return task, int(iteration), name != "final.md", name

    return sorted(answers, key=key)


class Scoring:
    """Judges batches; the report on disk holds every row so far."""

    def __init__(self, args: argparse.Namespace, cache: Path) -> None:
        self.args, self.cache = args, cache
        self.began = time.monotonic()
        self.report = new_report(SCHEMA, None, "bench.scores") | {"device": args.device, "sandbox": "", "answers": {}}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.report["answers"]

    async def judge(self, batch: Batch) -> None:
        left = self.began + self.args.budget_s - time.monotonic()
        if left <= 0:
            return
        pool = LocalPool(
            workers=batch.workers,
            device=self.args.device,
            limits=EvaluationLimits(sandbox=self.args.sandbox),
            cache=self.cache,
        )
        await pool.start()
        cancel = asyncio.get_running_loop().call_later(left, pool.cancel_search, "scores")
        try:
            await asyncio.gather(*(self._one(pool, answer, batch.again) for answer in batch.answers))
        finally:
            cancel.cancel()
            self.report["sandbox"] = pool.snapshot()["sandbox"]
            await pool.close()

    async def _one(self, pool: LocalPool, answer: Answer, again: bool) -> None:
        verdict = await pool.submit(answer.task, answer.candidate, search="scores").verdict()
        if verdict.status == Status.CANCELLED:
            return
        rows = self.rows
        rows[answer.name] = again_row(rows[answer.name], verdict) if again else score_row(verdict)
        self.report["conditions"] = verdict.conditions or self.report.get("conditions")
        write_report(self.args.json, self.report)
        row = rows[answer.name]
        figure = row.get("speedup") or row.get("why", "")
        print(f"{time.monotonic() - self.began:6.1f} s {answer.name} {row['status']} {figure}", flush=True)

    async def run(self, answers: list[Answer]) -> None:
        light = [answer for answer in answers if answer.kind != "cuda"]
        heavy = [answer for answer in answers if answer.kind == "cuda"]
        finals = [answer for answer in light if answer.name.endswith("/final.md")]
        others = [answer for answer in light if answer not in finals]
        if finals:
            await self.judge(Batch(finals, self.args.light_workers))
        together = [(others, self.args.light_workers), (heavy, self.args.workers)]
        await asyncio.gather(*(self.judge(Batch(some, workers)) for some, workers in together if some))
        timed = [answer for answer in others if self.rows.get(answer.name, {}).get("speedup")]
        if heavy and timed:
            await self.judge(Batch(timed, self.args.light_workers, again=True))
        built = [answer for answer in heavy if answer.name in self.rows][: self.args.alone]
        if built:
            await self.build_alone(built)

    async def build_alone(self, answers: list[Answer]) -> None:
        """One after the other, each with a line added, so that no earlier build of it is found."""
        limits = EvaluationLimits(sandbox=self.args.sandbox)
        pool = LocalPool(workers=1, device=self.args.device, limits=limits, cache=self.cache)
        await pool.start()
        try:
            for answer in answers:
                if self.began + self.args.budget_s - time.monotonic() < ALONE_S:
                    break
                candidate = Candidate(answer.candidate.source.replace("#include", "// built alone\n#include", 1))
                verdict = await pool.submit(answer.task, candidate, search="alone").verdict()
                self.rows[answer.name]["built_alone_s"] = score_row(verdict)["import_s"]
                write_report(self.args.json, self.report)
        finally:
            await pool.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="regular expression on an answer's path below TRACES")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--light-workers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=8, help="for answers that compile CUDA C++, two processes each")
    parser.add_argument("--alone", type=int, default=1, help="CUDA C++ answers that are built once more, alone")
    parser.add_argument("--sandbox", default="prefer")
    parser.add_argument("--budget-s", type=float, default=220.0)
    args = parser.parse_args()
    answers = in_order(read_answers(args.traces, args.only))
    if not answers:
        print(f"bench.scores: {args.traces} --only {args.only!r}: no answer with a module found", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        scoring = Scoring(args, Path(cache))
        asyncio.run(scoring.run(answers))
    missing = [answer.name for answer in answers if answer.name not in scoring.rows]
    scoring.report["not_judged"] = missing
    write_report(args.json, scoring.report)
    print(f"{len(scoring.rows)} of {len(answers)} judged; without a verdict: {', '.join(missing) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
