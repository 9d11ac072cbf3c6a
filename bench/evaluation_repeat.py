"""The same CPU candidates judged in several runs, each a pool of its own: do speed-ups agree within the intervals?

    python -m bench.evaluation_repeat --json F [--runs 2] [--budget-s 0.6] [--precision 0.03]

Six toy tasks with three candidates each, real verdicts through worker, sandbox and judge. Every run has fresh processes
and fresh memory; whatever else loads the machine meanwhile is part of what is measured. The report keeps the medians of
every round, so that another rule for the interval can be tried on the same times (figures() does).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.evaluation_figures import spread, variation
from bench.machine import new_report, write_report
from specgen_engine.evaluation.base import Candidate, Status, Task
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool

SCHEMA = "specgen.repeat/1"
MODULE = """
import torch
import torch.nn.functional as F
class {name}(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn({width}))
    def forward(self, x):
        {body}
def get_inputs():
    return [torch.randn({rows}, {width})]
def get_init_inputs():
    return []
"""
BODIES: dict[str, tuple[int, int, list[str]]] = {
    "softmax": (512, 1024, [
        "e = torch.exp(x - x.max(-1, keepdim=True).values); return e / e.sum(-1, keepdim=True) * self.w",
        "return torch.softmax(x, -1) * self.w",
        "return torch.softmax(x, -1).mul_(self.w)",
        "return torch.exp(torch.log_softmax(x, -1)) * self.w",
    ]),
    "layernorm": (2048, 512, [
        "m = x.mean(-1, True); v = ((x - m) ** 2).mean(-1, True); return (x - m) / (v + 1e-5).sqrt() * self.w",
        "return F.layer_norm(x, (x.shape[-1],), self.w)",
        "v, m = torch.var_mean(x, -1, correction=0, keepdim=True); return (x - m) * (v + 1e-5).rsqrt() * self.w",
        "m = x.mean(-1, True); d = x - m; return d * (d.square().mean(-1, True) + 1e-5).rsqrt() * self.w",
    ]),
    "rmsnorm": (256, 4096, [
        "return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * self.w",
        "return F.rms_norm(x, (x.shape[-1],), self.w, 1e-6)",
        "return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.w",
        "return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)).mul_(x.shape[-1] ** 0.5).mul_(self.w)",
    ]),
    "gelu": (1024, 1024, [
        "return 0.5 * x * (1 + torch.erf(x * 0.7071067811865476)) * self.w",
        "return F.gelu(x) * self.w",
        "return F.gelu(x).mul_(self.w)",
        "return torch.special.ndtr(x) * x * self.w",
    ]),
    "silu": (128, 2048, [
        "return x * (1 / (1 + torch.exp(-x))) * self.w",
        "return F.silu(x) * self.w",
        "return x * torch.sigmoid(x) * self.w",
        "return torch.sigmoid(x).mul_(x).mul_(self.w)",
    ]),
    "gram": (384, 384, [
        "return torch.stack([x @ row for row in x]) * self.w",
        "return x @ x.T * self.w",
        "return torch.mm(x, x.T).mul_(self.w)",
        "return torch.cat([part @ x.T for part in x.split(48)]) * self.w",
    ]),
}  # fmt: skip
Row = dict[str, Any]


def pairs() -> list[tuple[str, Task, Candidate]]:
    """(name, task, candidate) of all."""
    found = []
    for name, (rows, width, bodies) in BODIES.items():
        modules = [
            MODULE.format(name="ModelNew" if number else "Model", rows=rows, width=width, body=body)
            for number, body in enumerate(bodies)
        ]
        found += [(f"{name}-{number}", Task(modules[0], name), Candidate(modules[number])) for number in (1, 2, 3)]
    return found


async def one_run(number: int, limits: EvaluationLimits) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        pool = LocalPool(workers=1, limits=limits, cache=Path(cache))
        await pool.start()
        try:
            for name, task, candidate in pairs():
                verdict = await pool.submit(task, candidate, search="repeat").verdict()
                row = {"candidate": name, "run": number, "status": str(verdict.status), "reason": verdict.reason}
                if verdict.status is Status.CORRECT:
                    row |= {"speedup": verdict.speedup, "interval": verdict.interval, "time_s": verdict.stages["time"]}
                    row |= {"candidate_ms": verdict.candidate_ms, "rounds_ms": verdict.conditions["rounds_ms"]}
                rows.append(row)
        finally:
            await pool.close()
    return rows


def figures(rows: list[Row]) -> Row:
    """Of all pairs of runs of the same candidate: how many intervals overlap, and how far apart the speed-ups are."""
    mine: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == Status.CORRECT:
            mine.setdefault(row["candidate"], []).append(row)
    twos = [pair for runs in mine.values() for pair in itertools.combinations(runs, 2)]
    overlap = [a["interval"][0] <= b["interval"][1] and b["interval"][0] <= a["interval"][1] for a, b in twos]
    inside = [a["interval"][0] <= b["speedup"] <= a["interval"][1] for a, b in twos]
    widths = [(row["interval"][1] - row["interval"][0]) / 2 / row["speedup"] for runs in mine.values() for row in runs]
    return {
        "candidates": len(mine),
        "pairs": len(twos),
        "intervals_overlap": sum(overlap),
        "other_speedup_inside": sum(inside),
        "cv": spread([variation(a["speedup"], b["speedup"]) for a, b in twos]),
        "half_width": spread(widths),
        "rounds_p50": statistics.median(len(row["rounds_ms"]) for runs in mine.values() for row in runs),
        "time_stage_s": spread([row["time_s"] for runs in mine.values() for row in runs]),
        "not_correct": [row for row in rows if row["status"] != Status.CORRECT],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation_repeat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=EvaluationLimits().timing_budget_s)
    parser.add_argument("--precision", type=float, default=EvaluationLimits().precision)
    args = parser.parse_args()
    limits = EvaluationLimits(timing_budget_s=args.budget_s, precision=args.precision)
    report = new_report(SCHEMA, None, "bench.evaluation_repeat") | {"device": "cpu", "rows": []}
    for number in range(args.runs):
        report["rows"] += asyncio.run(one_run(number, limits))
        write_report(args.json, report)
        print(f"run {number} done", flush=True)
    report["figures"] = figures(report["rows"])
    write_report(args.json, report)
    print({name: value for name, value in report["figures"].items() if name != "not_correct"})
    print(*report["figures"]["not_correct"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
