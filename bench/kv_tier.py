"""Time to first token of a prefix by where its KV is: nowhere, in host memory, in a peer GPU, in the GPU's own cache.

    python -m bench.kv_tier --json F --plot F.png [--model DIR] [--attention-backend NAME]      # two GPUs
    python -m bench.kv_tier --backend loopback --quick --json F                                 # a rehearsal on a CPU

Two servers run the same model: one with --specgen-kv peer on GPU 0, whose lender is GPU 1, one with SGLang's HiCache in
host memory on GPU 1. Only one is asked at a time. The KV pool holds little more than the longest prefix, so asking for
the prefixes in turn evicts each before it is asked for again; a sample counts only when SGLang says that the prefix
came from the level it is booked under. Requests carry token ids, the prefix and a fresh suffix, and ask for one token;
the time is what the client sees.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from bench.kv_tier_client import Client
from bench.kv_tier_measure import Plan, measure_alone, measure_at_once, measure_under_decode
from bench.kv_tier_plot import plot
from bench.kv_tier_servers import Options, start_servers
from bench.machine import new_report, write_report
from specgen_engine.errors import SpecGenError

FULL = Plan((2_000, 8_000, 16_000, 32_000, 64_000), 3, 32, 2_000, 16, 900, 8_000, 4.0)
QUICK = Plan((128, 256, 512), 2, 4, 128, 2, 120, 128, 3.0)


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
    parser.add_argument("--budget-s", type=float, default=240, help="no measurement is begun after this")
    parser.add_argument("--logs", type=Path, default=Path("kv_tier_logs"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--wait-for-pids", type=int, nargs="*", default=[], help="measure only when these have ended")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    report = new_report("specgen.kv_tier/1", args.seed)
    report |= {"rows": [], "notes": [], "attention_backend": args.attention_backend, "backend": args.backend}
    deadline = time.monotonic() + args.budget_s
    options = Options(args.model, args.backend, args.attention_backend, max(plan.prefixes), args.logs)
    try:
        with ExitStack() as stack:
            clients = start_servers(stack, options)
            wait_for(args.wait_for_pids, deadline)
            for measure in (measure_alone, measure_at_once, measure_under_decode):
                for level, client in clients.items():
                    if time.monotonic() > deadline:
                        report["notes"].append(f"{level}: {measure.__name__} not run, {args.budget_s} s were over")
                        continue
                    try:
                        report["rows"] += measure(client, level, plan, args.seed, report["notes"])
                    except (SpecGenError, OSError, ValueError) as error:
                        report["notes"].append(f"{level}: {measure.__name__} failed: {error}")
                    print(f"{level} {measure.__name__}: {len(report['rows'])} rows", flush=True)
                    write_report(args.json, report)
            report["tier_state"] = clients[args.backend].tier_state()
    except SpecGenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_report(args.json, report)
    show(report["rows"], clients)
    if args.plot is not None:
        plot(report, args.plot)
    return 0


def wait_for(pids: list[int], deadline: float) -> None:
    """Others that use the same GPUs end first."""
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)


def show(rows: list[dict[str, object]], clients: dict[str, Client]) -> None:
    for row in rows:
        print({key: value for key, value in row.items() if value is not None})


if __name__ == "__main__":
    sys.exit(main())
