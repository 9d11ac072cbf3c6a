"""One candidate against one task, both KernelBench modules: the whole verdict as JSON.

    python -m bench.evaluation_one TASK.py CANDIDATE.py --json F [--device cuda:0] [--needs cutlass]

--needs: a package without which the candidate can't run; where it is missing, the report says so instead of a verdict.
For hosts where only this source tree and torch are installed; else use `specgen evaluate`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import new_report, write_report
from specgen_engine.evaluation.base import Candidate, Task, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool


async def judge(task: Task, candidate: Candidate, device: str, cache: Path) -> Verdict:
    pool = LocalPool(workers=1, device=device, limits=EvaluationLimits(), cache=cache)
    await pool.start()
    try:
        return await pool.submit(task, candidate, search="one").verdict()
    finally:
        await pool.close()


def measure(task: Path, candidate: Path, device: str, needs: str) -> dict[str, Any]:
    """The verdict's fields; "skipped" with the reason where a package is missing."""
    if needs and importlib.util.find_spec(needs) is None:
        return {"skipped": f"{candidate.name} needs the package {needs}, which {sys.executable} does not have"}
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        pair = Task(task.read_text(), task.stem), Candidate(candidate.read_text())
        return {"verdict": dataclasses.asdict(asyncio.run(judge(*pair, device, Path(cache))))}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation_one", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--needs", default="")
    args = parser.parse_args()
    found = measure(args.task, args.candidate, args.device, args.needs)
    report = new_report("specgen.one/1", None, "bench.evaluation_one") | {"device": args.device} | found
    write_report(args.json, report)
    found = json.loads(json.dumps(found))  # enumerations become words
    told = found.get("verdict", found)
    keys = ("skipped", "form", "status", "reason", "digest", "speedup", "interval", "candidate_ms", "sandbox", "stages")
    print({key: told[key] for key in keys if key in told})
    return 0


if __name__ == "__main__":
    sys.exit(main())
