"""The harness's own seconds a verdict on a CPU, by step: of this source tree, or of two by turns in one run.

    python -m bench.evaluation_overhead --json F [--beside TREE] [--rounds 4] [--verdicts 12]

A toy task with the reference at hand, with another task before each verdict, the latter with a model that takes long to
build on either side, and three such by turns. TREE is an older checkout's folder. Each round starts a pool of each
tree, so that both meet the same load; figures are over all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

SCHEMA = "specgen.evaluation_overhead/1"
TASK = """
import torch
class Model(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))
        self.more = torch.randn({numbers})
    def forward(self, x):
        return torch.softmax(x, -1) * self.weight
"""
GIVEN = """
def get_inputs():
    return [torch.randn(256, 512)]
def get_init_inputs():
    return [512]
"""
HEAVY = 48 << 20
CASES = {
    "reference at hand": (0, 1),
    "another task before": (0, 0),
    "another, slow to build": (HEAVY, 0),
    "three tasks by turns": (HEAVY, 3),
}
"""How many numbers a constructor draws, and how many tasks come by turns; 0: each verdict has a task of its own."""
Row = dict[str, Any]


async def judge(verdicts: int) -> dict[str, list[Row]]:
    """Rows of every case, by the package that this process imports."""
    from specgen_engine.evaluation.base import Candidate, Task
    from specgen_engine.evaluation.limits import EvaluationLimits
    from specgen_engine.pools.local import LocalPool

    found: dict[str, list[Row]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        pool = LocalPool(workers=1, limits=EvaluationLimits(timing_budget_s=0.2), cache=Path(cache))
        await pool.start()
        try:
            for case, (numbers, tasks) in CASES.items():
                model = TASK.format(numbers=numbers)
                for number in range(verdicts + max(1, tasks)):
                    task = Task(model + GIVEN + f"# {number % tasks if tasks else number}", case)
                    source = model.replace("class Model(", "class ModelNew(") + f"# {number} {case}"
                    began = time.monotonic()
                    verdict = await pool.submit(task, Candidate(source), search="overhead").verdict()
                    seconds = time.monotonic() - began - verdict.stages["queued"]
                    if number >= max(1, tasks) and verdict.status == "correct":  # the first have others' judges
                        found[case].append({"s": seconds, "own_s": verdict.own_s, "overhead": verdict.overhead})
        finally:
            await pool.close()
    return found


def run_tree(tree: Path, verdicts: int) -> dict[str, list[Row]]:
    command = [sys.executable, str(Path(__file__).resolve()), "--rows", "--verdicts", str(verdicts)]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=tree)
    return json.loads(done.stdout.splitlines()[-1])


def figures(rows: list[Row]) -> Row:
    overhead = sorted(sum(row["overhead"].values()) for row in rows)
    names = {name for row in rows for name in row["overhead"]}
    steps = {name: round(median(row["overhead"].get(name, 0.0) for row in rows), 4) for name in names}
    return {
        "n": len(rows),
        "verdict_s_p50": round(median(row["s"] for row in rows), 4),
        "overhead_s_p50": round(median(overhead), 4),
        "overhead_s_p95": round(overhead[min(len(overhead) - 1, int(0.95 * len(overhead)))], 4),
        "overhead_s_by_step": dict(sorted(steps.items(), key=lambda step: -step[1])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluation_overhead", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--beside", type=Path, help="an older checkout, measured by turns with this one")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--verdicts", type=int, default=12, help="a case and round")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows:
        print(json.dumps(asyncio.run(judge(args.verdicts))))
        return 0
    from bench.machine import new_report, write_report

    trees = ({"before": args.beside} if args.beside else {}) | {"now": Path(__file__).resolve().parents[1]}
    rows: dict[str, dict[str, list[Row]]] = {name: {case: [] for case in CASES} for name in trees}
    for _ in range(args.rounds):
        for name, tree in trees.items():
            for case, found in run_tree(tree, args.verdicts).items():
                rows[name][case] += found
    result = {case: {name: figures(rows[name][case]) for name in trees} for case in CASES}
    for case, both in result.items():
        for name, one in both.items():
            print(f"{case:24} {name:7} " + " ".join(f"{key} {value}" for key, value in one.items()))
    if args.json:
        report = new_report(SCHEMA, None, "bench.evaluation_overhead") | {"device": "cpu", "cases": result}
        write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
