"""Time to first token of a prefix by where its KV is: nowhere, in host memory, in a peer GPU, in the GPU's own cache.

    python -m bench.kv_tier --json F --plot F.png [--model DIR] [--attention-backend NAME]      # two GPUs
    python -m bench.kv_tier --backend loopback --quick --json F                                 # a rehearsal on a CPU

Three servers run the same model with the same KV pool: with --specgen-kv peer on GPU 0, whose lender is GPU 1; with the
tier off on GPU 0; with SGLang's HiCache in host memory on GPU 1. Each GPU has a lane that begins when its server is up:
on GPU 0 the tier's server computes the prefixes and `off` plays the searches, while on GPU 1 `host` still pins its
memory, plays the searches and computes the prefixes. When both lanes have ended, one server is asked at a time. The KV
pool holds little more than the longest prefix, so asking for the prefixes in turn evicts each before it is asked for
again; a sample counts only when SGLang says that the prefix came from the level it is booked under. Requests carry
token ids, the prefix and a fresh suffix, and ask for one token; the time is what the client sees. `gbps` is of loads
alone: bytes over SGLang's own timing of its load stream; what a restore costs beside that is `beyond_own_ms` less
`load_ms`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.kv_tier_client import Client
from bench.kv_tier_decode import measure_under_decode
from bench.kv_tier_measure import Plan, measure_alone, measure_at_once
from bench.kv_tier_plot import plot
from bench.kv_tier_prewarm import prewarm, warm_up
from bench.kv_tier_searches import expected_s, measure_searches
from bench.kv_tier_servers import Options, pool_tokens, start_servers
from bench.machine import new_report, write_report
from specgen_engine.errors import SpecGenError

FULL = Plan((2_000, 8_000, 16_000, 32_000, 64_000), 3, 32, 2_000, 16, 2_800, 8_000, 5, 1.0, 0.5, 8, 3, 16)
QUICK = Plan((128, 256, 512), 2, 4, 128, 2, 110, 64, 2, 1.5, 0.75, 8, 2, 4)
Measure = Callable[[Client, str, Plan, int, list[str]], list[dict[str, Any]]]
MEASURES: dict[str, tuple[Measure, Callable[[Plan, str], float]]] = {  # and seconds that one takes, by two H200
    "alone": (measure_alone, lambda _plan, _level: 6.0),
    "crowd": (measure_at_once, lambda _plan, _level: 6.0),
    "decodes": (measure_under_decode, lambda _plan, _level: 23.0),
    "searches": (measure_searches, expected_s),
}
PREWARM_S = 18.0
LEAST_S = 30.0  # less of `off`'s searches says nothing


class Bench:
    """The report as it grows: written after every measurement, so that what was measured is kept."""

    def __init__(self, report: dict[str, Any], target: Path, plan: Plan, deadline: float) -> None:
        self.report, self._target, self._plan, self._deadline = report, target, plan, deadline
        self._lock = threading.Lock()

    def measure(self, name: str, level: str, client: Client, until: float | None = None) -> None:
        """If time is left for it. A failure is noted, and the next measurement goes on.

        `until`: it ends then at the latest, with what was measured by then; by default it must fit before the deadline.
        """
        measure, expected = MEASURES[name]
        needed = LEAST_S if until is not None else expected(self._plan, level)
        client.until = self._deadline if until is None else until
        if time.monotonic() + needed > client.until:
            self.report["notes"].append(f"{level}, {name}: not run, the time was over")
            return
        try:
            rows = measure(client, level, self._plan, self.report["seed"], self.report["notes"])
        except (SpecGenError, OSError, ValueError, httpx.HTTPError) as error:
            self.report["notes"].append(f"{level}, {name}: failed: {error}")
            rows = []
        self.add(rows, f"{level}, {name}")

    def prewarm(self, level: str, client: Client, booked: bool) -> None:
        rows = prewarm(client, level, self._plan, self.report["seed"])
        self.add(rows if booked else [], f"{level}, prewarm")

    def add(self, rows: list[dict[str, Any]], what: str) -> None:
        with self._lock:
            self.report["rows"] += rows
            left = self._deadline - time.monotonic()
            print(f"{what}: {len(self.report['rows'])} rows, {left:.0f} s left", flush=True)
            write_report(self._target, self.report)


def quiet_order(wanted: list[str], levels: list[str]) -> list[tuple[str, str]]:
    """What is measured on one server at a time. `levels`: the tier's first. The host's long decodes come last."""
    pairs = [(name, level) for name in wanted for level in levels if name != "searches" or level == levels[0]]
    return sorted(pairs, key=lambda pair: pair[0] == "decodes" and pair[1] != levels[0])


def run(bench: Bench, starting: dict[str, Future[Client]], plan: Plan, wanted: list[str], deadline: float) -> None:
    seed, tier = bench.report["seed"], next(iter(starting))
    levels = [level for level in starting if level != "off"]
    quiet = quiet_order(wanted, levels)
    expected = sum(MEASURES[name][1](plan, level) for name, level in quiet if (name, level) != ("decodes", "host"))

    def first_gpu() -> None:
        client = starting[tier].result()
        warm_up(client, plan, seed)
        if "alone" in wanted:
            bench.prewarm(tier, client, booked=True)
        if "searches" in wanted:
            off = starting["off"].result()
            warm_up(off, plan, seed)
            bench.measure("searches", "off", off, until=deadline - expected)

    def second_gpu() -> None:
        client = starting["host"].result()
        warm_up(client, plan, seed)
        if "searches" in wanted:
            bench.measure("searches", "host", client, until=deadline - expected - PREWARM_S)
        if "alone" in wanted:
            bench.prewarm("host", client, booked=False)

    with ThreadPoolExecutor(2) as lanes:
        for lane in [lanes.submit(first_gpu)] + ([lanes.submit(second_gpu)] if "host" in starting else []):
            lane.result()
    for name, level in quiet:
        bench.measure(name, level, starting[level].result())
    bench.report["tier_state"] = starting[tier].result().tier_state()


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
        longest, measures = max(plan.prefixes), tuple(args.measure)
        options = Options(args.model, args.backend, args.attention_backend, longest, args.logs, measures)
        with ExitStack() as stack:
            starting = start_servers(stack, options)
            wait_for(args.wait_for_pids, deadline)
            run(Bench(report, args.json, plan, deadline), starting, plan, args.measure, deadline)
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
