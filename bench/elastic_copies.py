"""What KV copies do to a timed kernel on the same GPU: its coefficient of variation and median, with and without them.

    python -m bench.elastic_copies [--seconds 4] [--repeats 60] [--mib 64] [--json F]

Another process copies blocks as a KV tier would: between cuda:0 and cuda:1 both ways, on a single GPU to pinned host
memory. The kernel adds 1 to `mib` MiB on cuda:0, timed by the evaluation's own clock. By turns: quiet, copies, quiet.
A quiet lease keeps copies off for the time of a measurement, so `quiet` is what is timed under one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from bench.machine import new_report, write_report

COPY_BYTES = 64 << 20
TURNS = ("quiet", "copies", "quiet after")
READY_S = 60.0


def variation(nanoseconds: Sequence[int]) -> dict[str, float]:
    """cv: standard deviation over mean.  robust_cv: the same of normal times, from the quartiles; a spike is no matter.

    Raises StatisticsError for fewer than two.
    """
    low, _, high = statistics.quantiles(nanoseconds, n=4)
    median = statistics.median(nanoseconds)
    return {
        "calls": len(nanoseconds),
        "median_us": round(median / 1e3, 2),
        "cv": round(statistics.stdev(nanoseconds) / statistics.fmean(nanoseconds), 5),
        "robust_cv": round((high - low) / 1.349 / median, 5),
    }


def copy_on(to: str, ready: Event, go: Event, over: Event, copied: Any) -> None:
    """A process of its own: copies while `go` is set. copied: bytes so far. to: cuda:1 or cpu (pinned)."""
    here = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda:0")
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=to, pin_memory=to == "cpu")
    there.copy_(here)
    torch.cuda.synchronize(0)
    ready.set()
    while not over.is_set():
        if not go.wait(0.05):
            continue
        for target, source in ((there, here), (here, there)) * 4:
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(0)
        copied.value += 8 * COPY_BYTES


def timed(mib: int, seconds: float, repeats: int) -> list[int]:
    """Nanoseconds of calls, until there are so many of them or the time is over; two at least."""
    from specgen_engine.evaluation.clock import CudaClock

    clock = CudaClock("cuda:0")
    x = torch.zeros(mib << 18, device="cuda:0")
    out = torch.empty_like(x)
    for _ in range(3):
        clock.time(lambda: torch.add(x, 1.0, out=out))
    stop = time.monotonic() + seconds
    found: list[int] = []
    while len(found) < 2 or (len(found) < repeats and time.monotonic() < stop):
        found.append(clock.time(lambda: torch.add(x, 1.0, out=out))[0])
    return found


def measure(mib: int, seconds: float, repeats: int) -> dict[str, Any]:
    """A row a turn. Raises RuntimeError when the process that copies does not start."""
    to = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    spawn = multiprocessing.get_context("spawn")
    ready, go, over, copied = spawn.Event(), spawn.Event(), spawn.Event(), spawn.Value("q", 0, lock=False)
    copier = spawn.Process(target=copy_on, args=(to, ready, go, over, copied), daemon=True)
    copier.start()
    rows = {}
    try:
        if not ready.wait(READY_S):
            raise RuntimeError(f"the process that copies to {to} is not ready after {READY_S:g} s; see its words above")
        for turn in TURNS:
            if turn == "copies":
                go.set()
                time.sleep(0.1)
            before, start = copied.value, time.monotonic()
            rows[turn] = variation(timed(mib, seconds, repeats))
            rows[turn]["copied_gbps"] = round((copied.value - before) / (time.monotonic() - start) / 1e9, 1)
            go.clear()
            time.sleep(0.1)
    finally:
        over.set()
        copier.join(10)
        if copier.is_alive():
            copier.kill()
    return {"copies_to": to, "kernel_mib": mib, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.elastic_copies", description=__doc__, formatter_class=plain)
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, a turn")
    parser.add_argument("--repeats", type=int, default=60, help="calls, a turn")
    parser.add_argument("--mib", type=int, default=64, help="that the kernel reads, and writes")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args(arguments)
    for name in ("seconds", "repeats", "mib"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)}: use a number above 0")
    if not torch.cuda.is_available():
        print("skipped: needs a GPU")
        return 0
    found = measure(options.mib, options.seconds, options.repeats)
    for turn, row in found["rows"].items():
        print(f"{turn:<12} {row}")
    if options.json:
        write_report(options.json, new_report("specgen.elastic-copies/1", 0) | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
