"""Profiles of recorded answers on a GPU by every tool, and the device's peaks as measured beside those claimed.

    python -m bench.profiles TRACES --json F [--device cuda:0] ANSWER ...

An ANSWER is a path below TRACES (ours/rmsnorm_residual/iter-1/final.md). Answers run side by side, since some compile
for half a minute; what works on the GPU takes turns there, as always. One answer's tools follow each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import new_report, write_report
from specgen_engine.controller.answers import extract_candidate
from specgen_engine.evaluation.base import Candidate, Task
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool

TOOLS = ("ncu", "cupti", "torch.profiler")
PEAKS = """
import json, sys
from specgen_engine.evaluation.profile.device import device_facts, measured_peaks
from specgen_engine.evaluation.profile.roofline import peaks_of
facts = device_facts(sys.argv[1])
claimed = peaks_of(facts)
print(json.dumps({"facts": facts._asdict(), "claimed": claimed._asdict(), "measured": measured_peaks(sys.argv[1])}))
"""


def peaks(device: str) -> dict[str, Any]:
    """In a process of its own, which then gives the GPU back."""
    done = subprocess.run([sys.executable, "-c", PEAKS, device], capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-400:]}


async def one_answer(pool: LocalPool, traces: Path, name: str, tools: list[str]) -> list[dict[str, Any]]:
    path = traces / name
    task = Task((path.parent.parent / "task.py").read_text(), path.parent.parent.name)
    source = extract_candidate(path.read_text())
    if source is None:
        raise SystemExit(f"{path}: no fenced module in this answer")
    rows = []
    for tool in tools:
        began = time.monotonic()
        job = pool.submit(task, Candidate(source), search="profiles", options={"profile": tool})
        verdict = await job.verdict()
        rows.append(
            {
                "answer": name,
                "asked": tool,
                "status": str(verdict.status),
                "reason": verdict.reason,
                "candidate_ms": verdict.candidate_ms,
                "speedup": verdict.speedup,
                "roofline": verdict.roofline,
                "sandbox": verdict.sandbox,
                "stages": {str(stage): seconds for stage, seconds in verdict.stages.items()},
                "seconds": round(time.monotonic() - began, 2),
                "profile": verdict.profile,
            }
        )
        text = (verdict.profile or {}).get("text", f"no profile: {verdict.status} {verdict.reason} {verdict.digest}")
        print(f"--- {name} asked for {tool}: {rows[-1]['stages']}\n{text}", flush=True)
    return rows


async def measure(args: argparse.Namespace, cache: Path) -> list[dict[str, Any]]:
    limits = EvaluationLimits(profile_s=args.profile_s)
    pool = LocalPool(workers=len(args.answers), device=args.device, limits=limits, cache=cache)
    await pool.start()
    try:
        tools = args.tools.split(",")
        found = await asyncio.gather(*(one_answer(pool, args.traces, name, tools) for name in args.answers))
    finally:
        await pool.close()
    return [row for rows in found for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path)
    parser.add_argument("answers", nargs="+", metavar="ANSWER")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--profile-s", type=float, default=60.0)
    args = parser.parse_args()
    report = new_report("specgen.profiles/1", None, "bench.profiles")
    report |= {"device": args.device}
    if args.device.startswith("cuda"):
        report["peaks"] = peaks(args.device)
        print(json.dumps(report["peaks"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        report["profiles"] = asyncio.run(measure(args, Path(cache)))
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
