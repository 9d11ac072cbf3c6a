"""What KV copies do to a timed kernel on the same GPU, and that a quiet lease keeps them off.

    python -m bench.elastic_copies [--device cuda:0] [--seconds 4] [--repeats 60] [--mib 64] [--json F]

The device lends memory as an evaluator does; another process borrows it for a KV pool of its own, on another GPU where
there is one, and copies pages to and fro without a break. The kernel adds 1 to `mib` MiB on the device, timed by the
evaluation's own clock. By turns: quiet (nobody copies), copies, copies that a quiet lease holds off, quiet again.
`--device cpu` rehearses it over shared memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from bench.machine import new_report, write_report
from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import Backend
from specgen_engine.kv.borrower import Link
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import MAX_QUIET_S, Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv

CHUNK_BYTES, CHUNKS = 64 << 20, 8
PAGE_BYTES, PLANES = 1 << 16, 4
PAGES_AT_ONCE = 1024
LEASE = "copies, quiet lease"
TURNS = ("quiet", "copies", LEASE, "quiet after")
READY_S, REACH_S = 90.0, 0.5
LEAST_S = 0.5
"""A turn: 60 calls may be over before one copy is."""


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


def backend_of(device: str) -> Backend:
    return LoopbackBackend() if device == "cpu" else CudaBackend(torch.device(device).index or 0)


def other_than(device: str) -> str:
    """Where the borrower's own pool is: the next GPU, else the same device."""
    count = torch.cuda.device_count()
    return device if device == "cpu" else f"cuda:{((torch.device(device).index or 0) + 1) % count}"


def borrow_and_copy(device: str, lender: Path, ready: Event, go: Event, over: Event, copied: Any) -> None:
    """A process of its own: copies pages out and in while `go` is set. copied: bytes so far."""
    pool = torch.zeros((PLANES, PAGES_AT_ONCE, PAGE_BYTES // PLANES), dtype=torch.uint8, device=device)
    planes = [_kv.Plane(plane.data_ptr(), plane.stride(0), plane.shape[1]) for plane in pool]
    arena = PageArena(backend_of(device), planes, _kv.ArenaLayout.PAGE_FIRST, CHUNKS, CHUNK_BYTES)
    link = Link(arena, lender, "bench-copies", timeout_s=READY_S)
    while (missing := CHUNKS - link.chunks) > 0:
        link.grow(missing)
    refs, pages = arena.allocate(PAGES_AT_ONCE), list(range(PAGES_AT_ONCE))
    arena.export(pages, refs).result()
    ready.set()
    while not over.is_set():
        if go.wait(0.05):
            for copy in (arena.export, arena.import_):
                copy(pages, refs, quiet="wait", wait_s=2 * MAX_QUIET_S).result()
                copied.value += PAGES_AT_ONCE * PAGE_BYTES
    link.close()


def timed(device: str, mib: int, seconds: float, repeats: int) -> list[int]:
    """Nanoseconds of calls, until there are so many of them or the time is over; two at least."""
    from specgen_engine.evaluation.clock import clock_for

    clock = clock_for(device)
    x = torch.zeros(mib << 18, device=device)
    out = torch.empty_like(x)
    for _ in range(3):
        clock.time(lambda: torch.add(x, 1.0, out=out))
    stop = time.monotonic() + seconds
    found: list[int] = []
    while len(found) < 2 or (len(found) < repeats and time.monotonic() < stop):
        found.append(clock.time(lambda: torch.add(x, 1.0, out=out))[0])
    return found


@contextmanager
def copying(lender: Lender, turn: str, go: Event) -> Iterator[bool | None]:
    """The turn's copies; yields whether the lease was reached, None where there is none."""
    if turn in ("copies", LEASE):
        go.set()
        time.sleep(0.1)
    try:
        if turn == LEASE:
            with lender.quiet(MAX_QUIET_S, REACH_S) as reached:
                yield reached
        else:
            yield None
    finally:
        go.clear()
        time.sleep(0.2)


def measure(device: str, mib: int, seconds: float, repeats: int) -> dict[str, Any]:
    """A row a turn. Raises RuntimeError when the process that copies does not start."""
    to = other_than(device)
    spawn = multiprocessing.get_context("spawn")
    ready, go, over, copied = spawn.Event(), spawn.Event(), spawn.Event(), spawn.Value("q", 0, lock=False)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="specgen-kv-") as folder:
        lender = Lender(Path(folder) / "s", "bench", backend_of(device), CHUNK_BYTES, CHUNKS)
        copier = spawn.Process(target=borrow_and_copy, args=(to, lender.path, ready, go, over, copied), daemon=True)
        copier.start()
        try:
            if not ready.wait(READY_S):
                raise RuntimeError(f"the process that copies to {to} is not ready after {READY_S:g} s; see above")
            for turn in TURNS:
                with copying(lender, turn, go) as reached:
                    before, start = copied.value, time.monotonic()
                    rows[turn] = variation(timed(device, mib, seconds, repeats))
                    time.sleep(max(0.0, start + LEAST_S - time.monotonic()))
                    gbps = (copied.value - before) / (time.monotonic() - start) / 1e9
                rows[turn] |= {"copied_gbps": round(gbps, 1)} | ({} if reached is None else {"reached": reached})
        finally:
            over.set()
            copier.join(10)
            if copier.is_alive():
                copier.kill()
            lender.close()
    return {"device": device, "borrower": to, "kernel_mib": mib, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.elastic_copies", description=__doc__, formatter_class=plain)
    parser.add_argument("--device", default="cuda:0", help="lends memory and times the kernel; cpu is a rehearsal")
    parser.add_argument("--seconds", type=float, default=4.0, help=f"at most, a turn; below {MAX_QUIET_S:g}")
    parser.add_argument("--repeats", type=int, default=60, help="calls, a turn")
    parser.add_argument("--mib", type=int, default=64, help="that the kernel reads, and writes")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args(arguments)
    for name in ("seconds", "repeats", "mib"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)}: use a number above 0")
    if options.seconds >= MAX_QUIET_S:
        parser.error(f"--seconds {options.seconds:g}: a lease lasts {MAX_QUIET_S:g} s at most; use less")
    if options.device != "cpu" and not torch.cuda.is_available():
        print("skipped: needs a GPU")
        return 0
    found = measure(options.device, options.mib, options.seconds, options.repeats)
    for turn, row in found["rows"].items():
        print(f"{turn:<20} {row}")
    if options.json:
        write_report(options.json, new_report("specgen.elastic-copies/2", 0) | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
