"""What a process takes to be ready on a GPU, by step: alone, several at once, and beside others that have a context.

    python -m bench.evaluation_contexts --json F [--device cuda:0] [--at-once 1,4,8] [--held 0,16] [--rounds 2]

Processes are forked as a worker forks its spares and do what these do (evaluation/warm.py). Each kind is one row a
process: candidate (context, clock, one kernel), judge (what a comparison loads, too), and candidate with the
environment of VARIANTS. "last" is when the slowest of those at once was ready, over how many there are: what one
context costs a GPU that makes several. "gone": from SIGKILL until the last of them was collected.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.evaluation_figures import percentiles
from bench.machine import new_report, write_report
from specgen_engine.evaluation import warm
from specgen_engine.evaluation.clock import CudaClock
from specgen_engine.evaluation.worker_main import import_for_children

LIFE_S = 60
Steps = Sequence[tuple[str, Callable[[str], object]]]
VARIANTS: dict[str, dict[str, str]] = {
    "candidate": {},
    "judge": {},
    "candidate, one queue": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
}
"""Kinds of processes, each with what its environment has before the driver is asked anything."""


def _one_kernel(device: str) -> None:
    torch.zeros(1, device=device).add_(1)
    torch.cuda.synchronize(device)


CANDIDATE: Steps = (
    ("init", lambda device: torch.cuda.init()),
    ("context", lambda device: torch.empty(1, device=device)),
    ("clock", lambda device: CudaClock(device).settle()),
    ("kernel", _one_kernel),
)
JUDGE: Steps = (*CANDIDATE, ("comparison", warm.compare_anything))


class Ready(NamedTuple):
    """A forked process that has told its seconds by step, and waits to be killed. fault: why it could not."""

    pid: int
    seconds: dict[str, float]
    fault: str


def make(count: int, steps: Steps, device: str, environment: dict[str, str]) -> tuple[list[Ready], float]:
    """So many at once; and the seconds until the last was ready."""
    start_read, start_write = os.pipe()
    answers: dict[int, int] = {}
    for _ in range(count):
        answer_read, answer_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(start_write)
            _be_ready(start_read, answer_write, steps, device, environment)
        os.close(answer_write)  # before the next is forked, which would keep it open
        answers[pid] = answer_read
    os.close(start_read)
    began = time.monotonic()
    os.close(start_write)  # all begin
    told = {pid: _read(end) for pid, end in answers.items()}
    passed = time.monotonic() - began
    return [Ready(pid, one["seconds"], one["fault"]) for pid, one in told.items()], passed


def _read(end: int) -> dict[str, Any]:
    with os.fdopen(end) as file:
        text = file.read()
    return json.loads(text) if text else {"seconds": {}, "fault": "it died"}


def _be_ready(start: int, answer: int, steps: Steps, device: str, environment: dict[str, str]) -> None:
    """In the child; never returns, and is gone after LIFE_S whatever becomes of its parent."""
    signal.alarm(LIFE_S)
    os.environ.update(environment)
    seconds: dict[str, float] = {}
    fault = ""
    try:
        os.read(start, 1)
        for name, step in steps:
            began = time.monotonic()
            step(device)
            seconds[name] = round(time.monotonic() - began, 4)
    except BaseException as error:  # told, and the child ends below whatever it was
        fault = f"{type(error).__name__}: {error}"[:200]
    os.write(answer, json.dumps({"seconds": seconds, "fault": fault}).encode())
    os.close(answer)
    while True:
        signal.pause()


def end(made: Sequence[Ready]) -> float:
    """Seconds until all are gone."""
    began = time.monotonic()
    for one in made:
        os.kill(one.pid, signal.SIGKILL)
    for one in made:
        os.waitpid(one.pid, 0)
    return time.monotonic() - began


@contextmanager
def held(count: int, device: str, steps: Steps = CANDIDATE) -> Iterator[None]:
    made, _ = make(count, steps, device, {})
    try:
        yield
    finally:
        end(made)


def measure(
    device: str, at_once: Sequence[int], beside: Sequence[int], rounds: int, kinds: dict[str, Steps]
) -> list[dict[str, Any]]:
    """A row for each kind, count and number of contexts beside them."""
    rows = []
    for others in beside:
        with ExitStack() as stack:
            stack.enter_context(held(others, device, next(iter(kinds.values()))))
            for (kind, steps), count in itertools.product(kinds.items(), at_once):
                rows.append({"kind": kind, "at_once": count, "held": others})
                rows[-1] |= _rounds(count, steps, device, VARIANTS.get(kind, {}), rounds)
                print(json.dumps(rows[-1]), flush=True)
    return rows


def _rounds(count: int, steps: Steps, device: str, environment: dict[str, str], rounds: int) -> dict[str, Any]:
    made: list[Ready] = []
    last, gone = [], []
    for _ in range(rounds):
        some, passed = make(count, steps, device, environment)
        made += some
        last.append(passed / count)
        gone.append(end(some) / count)
    names = dict.fromkeys(name for one in made for name in one.seconds)
    by_step = {name: percentiles([one.seconds[name] for one in made if name in one.seconds]) for name in names}
    figures = {"seconds": by_step, "last_s_each": round(min(last), 4), "gone_s_each": round(min(gone), 4)}
    return figures | {"faults": sorted({one.fault for one in made if one.fault})}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation_contexts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--at-once", default="1,4,8")
    parser.add_argument("--held", default="0,16", help="idle contexts of others meanwhile")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    import_for_children(args.device)
    report = new_report("specgen.contexts/1", None, "bench.evaluation_contexts") | {"device": args.device}
    kinds = {kind: JUDGE if kind == "judge" else CANDIDATE for kind in VARIANTS}
    at_once, beside = ([int(one) for one in text.split(",")] for text in (args.at_once, args.held))
    report["rows"] = measure(args.device, at_once, beside, args.rounds, kinds)
    write_report(args.json, report)
    return int(any(row["faults"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
