"""Time to first token of a prefix by where its KV is: nowhere, in host memory, in a peer GPU, in the GPU's own cache.

    python -m bench.kv_tier --json F --plot F.png [--model DIR] [--attention-backend NAME]      # two GPUs
    python -m bench.kv_tier --backend loopback --quick --json F                                 # a rehearsal on a CPU

Three servers run the same model with the same KV pool: with --specgen-kv peer on GPU 0, whose lender is GPU 1; with the
tier off on GPU 0; with SGLang's HiCache in host memory on GPU 1. All start, and compute the prefixes, at once; then one
is asked at a time, but for the searches of `host` and `off`, which share no GPU. The KV pool holds little more than the
longest prefix, so asking for the prefixes in turn evicts each before it is asked for again; a sample counts only when
SGLang says that the prefix came from the level it is booked under. Requests carry token ids, the prefix and a fresh
suffix, and ask for one token; the time is what the client sees. `gbps` is of loads alone: bytes over SGLang's own
timing of its load stream; what a restore costs beside that is `beyond_own_ms` less `load_ms`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.kv_tier_client import Client
from bench.kv_tier_decode import measure_under_decode
from bench.kv_tier_measure import Plan, measure_alone, measure_at_once
from bench.kv_tier_plot import plot
from bench.kv_tier_prewarm import prewarm
from bench.kv_tier_searches import measure_searches
from bench.kv_tier_servers import Options, pool_tokens, start_servers
from bench.machine import new_report, write_report
from specgen_engine.errors import SpecGenError

FULL = Plan((2_000, 8_000, 16_000, 32_000, 64_000), 3, 32, 2_000, 16, 2_800, 8_000, 5, 1.0, 0.5, 8, 4, 32)
QUICK = Plan((128, 256, 512), 2, 4, 128, 2, 110, 64, 2, 1.5, 0.75, 8, 2, 4)
Measure = Callable[[Client, str, Plan, int, list[str]], list[dict[str, Any]]]
MEASURES: dict[str, tuple[Measure, float]] = {  # and the seconds that one takes at most, by two H100
    "alone": (measure_alone, 12.0),
    "crowd": (measure_at_once, 9.0),
    "searches": (measure_searches, 55.0),
    "decodes": (measure_under_decode, 25.0),
}


class Bench:
    """The report as it grows: written after every measurement, so that what was measured is kept."""

    def __init__(self, report: dict[str, Any], target: Path, plan: Plan, deadline: float) -> None:
        self.report, self._target, self._plan, self._deadline = report, target, plan, deadline

    def measure(self, name: str, clients: dict[str, Client]) -> None:
        """On all of these at once, if time is left. A failure is noted, and the next measurement goes on."""
        measure, expected_s = MEASURES[name]
        if time.monotonic() + expected_s > self._deadline:
            self.report["notes"].append(f"{name} of {', '.join(clients)}: not run, the time was over")
            return
        with ThreadPoolExecutor(len(clients)) as threads:
            found = {level: threads.submit(self._one, measure, level, client) for level, client in clients.items()}
        for level, future in found.items():
            self.add(future.result(), f"{level}, {name}")

    def add(self, rows: list[dict[str, Any]], what: str) -> None:
        self.report["rows"] += rows
        left = self._deadline - time.monotonic()
        print(f"{what}: {len(self.report['rows'])} rows, {left:.0f} s left", flush=True)
        write_report(self._target, self.report)

    def _one(self, measure: Measure, level: str, client: Client) -> list[dict[str, Any]]:
        notes, seed = self.report["notes"], self.report["seed"]
        try:
            return measure(client, level, self._plan, seed, notes)
        except (SpecGenError, OSError, ValueError, httpx.HTTPError) as error:
            notes.append(f"{level}: {measure.__name__} failed: {error}")
            return []


def run(bench: Bench, clients: dict[str, Client], plan: Plan, wanted: list[str]) -> None:
    bench.add(prewarm(clients, plan, bench.report["seed"]), "prewarm")
    tier = next(iter(clients))
    others = {level: client for level, client in clients.items() if level != tier}
    for name in wanted:
        if name == "searches":
            bench.measure(name, {tier: clients[tier]})
            bench.measure(name, others)
            continue
        for level in clients:
            if level != "off":
                bench.measure(name, {level: clients[level]})
    bench.report["tier_state"] = clients[tier].tier_state()


def shortened(plan: Plan, longest: int) -> Plan:
    """The plan for a pool of another size. Raises SpecGenError when no prefix of it is left."""
    prefixes = tuple(length for length in plan.prefixes if length <= longest)
    if len(prefixes) < 2:
        raise SpecGenError(f"--longest {longest}: two prefixes at least are needed, {plan.prefixes[1]} or more")
    crowd_tokens = min(plan.crowd_tokens, pool_tokens(max(prefixes)) // plan.crowd - 16)
    return plan._replace(prefixes=prefixes, crowd_tokens=crowd_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_tier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--model", type=Path, help="folder with a config.json and a tokenizer; weights are random")
    parser.add_argument("--backend", choices=("peer", "loopback"), default="peer")
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--quick", action="store_true", help="short prefixes: a rehearsal, not a measurement")
    parser.add_argument(
        "--longest", type=int, default=max(FULL.prefixes), help="tokens; the KV pool holds a little more"
    )
    parser.add_argument("--measure", nargs="+", choices=tuple(MEASURES), default=list(MEASURES), help="in this order")
    parser.add_argument("--budget-s", type=float, default=280, help="what would take longer is not begun")
    parser.add_argument("--logs", type=Path, default=Path("kv_tier_logs"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--wait-for-pids", type=int, nargs="*", default=[], help="measure only when these have ended")
    args = parser.parse_args()
    report = new_report("specgen.kv_tier/1", args.seed)
    report |= {"rows": [], "notes": [], "attention_backend": args.attention_backend, "backend": args.backend}
    deadline = time.monotonic() + args.budget_s
    try:
        plan = QUICK if args.quick else shortened(FULL, args.longest)
        options = Options(args.model, args.backend, args.attention_backend, max(plan.prefixes), args.logs)
        with ExitStack() as stack:
            clients = start_servers(stack, options)
            wait_for(args.wait_for_pids, deadline)
            run(Bench(report, args.json, plan, deadline), clients, plan, args.measure)
    except SpecGenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_report(args.json, report)
    show(report)
    if args.plot is not None:
        plot(report, args.plot)
    return 0


def wait_for(pids: list[int], deadline: float) -> None:
    """Others that use the same GPUs end first."""
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)


def show(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        print({key: value for key, value in row.items() if value is not None})
    for note in report["notes"]:
        print(note)


if __name__ == "__main__":
    sys.exit(main())
