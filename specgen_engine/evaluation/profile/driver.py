"""The program that a tool runs: the candidate, constructed as when it was judged, called between profiler marks.

    python -m specgen_engine.evaluation.profile.driver PLAN.json

Beside the plan it leaves driver.json: what it came to. Inputs, weights and arguments lie in a file that the judge
wrote; the task's source is not here.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

WARM_UPS = 3
"""Calls before the marks: just-in-time compilers and their tuning end there."""
REPORT = "driver.json"
CONFINED = "confined"
"""Beside the plan as soon as the sandbox is in force; the candidate, loaded after that, can't write there."""


def main() -> int:
    """Exit code 0 when the marked call came to its end."""
    plan_path = Path(sys.argv[1])
    plan = json.loads(plan_path.read_text())
    report = plan_path.with_name(REPORT).open("w")
    try:
        call, device = _prepare(plan, plan_path.with_name(CONFINED))
        _run(call, device)
    except BaseException as error:  # the candidate may raise anything, SystemExit too
        text = "".join(traceback.format_exception(error))
        _say(report, {"state": "failed", "line": f"{type(error).__name__}: {error}"[:400], "text": text[-4000:]})
        return 1
    _say(report, {"state": "done"})
    return 0


def _prepare(plan: dict[str, Any], marker: Path) -> tuple[Any, str]:
    import torch

    from ..base import Candidate
    from ..subject import Subject
    from ..tensors import read_values

    device = plan["device"]
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    values = os.open(plan["values"], os.O_RDWR)
    if plan["confine"] is not None:
        with marker.open("w") as mark:
            _confine(plan["confine"], device)
            mark.write("yes")
    source = Path(plan["candidate"]).read_text()
    subject = Subject(None, Candidate(source), device, (values, values))  # type: ignore[arg-type]
    subject.load()
    subject.construct(plan["init"], plan["seed"])
    subject.take_weights(plan["weights"])
    arguments = read_values(values, plan["inputs"], device)
    return (lambda: subject.model(*arguments)), device


def _confine(paths: dict[str, list[str]], device: str) -> None:
    """After the tool's library has its connection, which the first use of CUDA makes. Raises OSError when refused."""
    import torch

    from .. import sandbox

    if device.startswith("cuda"):
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    writable, readable = (tuple(map(Path, paths[name])) for name in ("writable", "readable"))
    sandbox.enter(sandbox.Policy((*writable, Path(os.environ["TMPDIR"])), device, sandbox.FILES, readable))


def _run(call: Any, device: str) -> None:
    import torch

    on_gpu = device.startswith("cuda")
    with torch.no_grad():
        for _ in range(WARM_UPS):
            call()
        if not on_gpu:
            call()
            return
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaProfilerStop()


def _say(report: TextIO, message: dict[str, str]) -> None:
    report.write(json.dumps(message))
    report.flush()


if __name__ == "__main__":
    sys.exit(main())
