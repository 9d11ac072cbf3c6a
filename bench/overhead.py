"""What ordinary chat traffic pays for SpecGen: flag off, flag on and idle, beside searches, and beside their forks.

    python -m bench.overhead --json F [--model CONFIG --gpus 0 --attention-backend triton] [--rounds 4] [--budget-s 110]

Two servers up at once, one without --enable-specgen. A round asks the same requests, whose lengths are recorded ones
(bench/overhead_traffic.py), once in each of four arms; every second round runs backwards, and only one arm runs at a
time, so that two servers may share a GPU. `searches` are reasonings of random text that go on all the while; `forks`
are those with a fork every 400 tokens. Ratios are paired by round. Without --model: the tiny model on the CPU engine,
prompts 16 and answers 4 times shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.e2e_servers import GPU_ARGUMENTS, TRITON_ARGUMENTS
from bench.engine_overhead import interval_of
from bench.engine_servers import Wanted, together
from bench.machine import new_report, write_report
from bench.overhead_traffic import FORK_EVERY, FORK_TOKENS, Arm, Length, Served, Traffic, lengths
from specgen_engine.errors import SpecGenError
from specgen_engine.serving.process import Server, running_server

ARMS = (
    Arm("off", False, None),
    Arm("idle", True, None),
    Arm("searches", True, "none"),
    Arm("forks", True, "forks"),
)
# (arm, the arm it is compared with): the flag, searches as such, forks.
PAIRS = (("idle", "off"), ("searches", "idle"), ("forks", "searches"))
POOL_TOKENS, CPU_POOL_TOKENS = 98_304, 16_384
START_S = 170
CPU_SHRINK, CPU_FORK_EVERY = 16, 32
Round = Mapping[str, Served]


def order(number: int) -> list[Arm]:
    """ABBA: of every two arms each comes first as often as the other."""
    return list(ARMS if number % 2 == 0 else reversed(ARMS))


def figures(served: Served) -> dict[str, float | None]:
    """Tokens a second of the ordinary requests; times in milliseconds; search_rate: of a search beside them."""
    return {
        "tokens_per_s": served.tokens / served.wall_s,
        "ttft_p50_ms": 1000 * statistics.median(served.ttft_s),
        "ttft_p95_ms": 1000 * at_share(served.ttft_s, 0.95),
        "gap_mean_ms": 1000 * statistics.fmean(served.gaps_s),
        "gap_p50_ms": 1000 * statistics.median(served.gaps_s),
        "gap_p99_ms": 1000 * at_share(served.gaps_s, 0.99),
        "search_rate": served.search_rate,
        "forks": served.forks,
    }


def at_share(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def compared(rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """By pair of arms and figure: the ratio's mean over rounds, and its 95 % interval from two rounds on."""
    found: dict[str, dict[str, Any]] = {}
    for arm, other in PAIRS:
        rows = [(figures(one[arm]), figures(one[other])) for one in rounds]
        pairs = {name: [(a[name], b[name]) for a, b in rows] for name in rows[0][0]}
        ratios = {name: [a / b for a, b in values if a and b] for name, values in pairs.items()}
        found[f"{arm}/{other}"] = {
            name: {"mean": values[0]} if len(values) == 1 else interval_of(values)._asdict()
            for name, values in ratios.items()
            if values and name != "forks"
        }
    return found


def medians(rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
    """By arm: each figure's median over rounds."""
    found = {}
    for arm in ARMS:
        rows = [figures(one[arm.name]) for one in rounds]
        kept = {name: [value for row in rows if (value := row[name]) is not None] for name in rows[0]}
        found[arm.name] = {name: round(statistics.median(values), 3) for name, values in kept.items() if values}
    return found


async def measure(urls: Mapping[bool, str], wanted: Sequence[Length], args: argparse.Namespace) -> list[Round]:
    """urls: by flag. A first round warms both servers up and is not kept."""
    rounds: list[Round] = []
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        traffic = {flag: Traffic(client, url, wanted, args.at_once) for flag, url in urls.items()}
        warm = {flag: Traffic(client, url, wanted[: args.at_once], args.at_once) for flag, url in urls.items()}
        for arm in ARMS:
            await warm[arm.flag].burst(arm.trigger, args.searches, args.fork_every)
        started, longest = time.monotonic(), 0.0
        for number in range(args.rounds):
            begun = time.monotonic()
            if args.budget_s and rounds and begun - started + longest > args.budget_s:
                print(f"round {number + 1}: not run, it would pass {args.budget_s:g} s", flush=True)
                break
            served = {}
            for arm in order(number):
                served[arm.name] = await traffic[arm.flag].burst(arm.trigger, args.searches, args.fork_every)
            rounds.append(served)
            longest = max(longest, time.monotonic() - begun)
            print(f"round {number + 1}: " + ", ".join(f"{k} {v.wall_s:.2f} s" for k, v in served.items()), flush=True)
    return rounds


@contextmanager
def servers(args: argparse.Namespace, logs: Path) -> Iterator[dict[bool, str]]:
    """URLs by flag, of two servers that start side by side. Raises SpecGenError with the log's last error."""
    if args.model is None:
        arguments = ("--tiny", "--max-total-tokens", str(CPU_POOL_TOKENS))
        with together(logs, Wanted(arguments), Wanted(arguments, specgen=False)) as (on, off):
            yield {True: on.url, False: off.url}
        return
    if not (args.model / "config.json").is_file():
        raise SpecGenError(f"--model {args.model}: give a folder with a config.json and a tokenizer")
    gpus = {False: args.gpus[0], True: args.gpus[-1]}
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:

        def start(flag: bool, gpu: int) -> Server:
            words, log = gpu_arguments(args, flag, gpu), logs / f"server_{'on' if flag else 'off'}.log"
            return stack.enter_context(running_server(words, log, None, START_S))

        futures = {flag: threads.submit(start, flag, gpu) for flag, gpu in gpus.items()}
        up = {flag: future.result() for flag, future in futures.items()}
        print(", ".join(f"flag {'on' if flag else 'off'}: up in {one.startup_s:.0f} s" for flag, one in up.items()))
        yield {flag: one.url for flag, one in up.items()}


def gpu_arguments(args: argparse.Namespace, flag: bool, gpu: int) -> list[str]:
    """Both servers differ in SpecGen's flags only."""
    words = ["--model-path", str(args.model), *GPU_ARGUMENTS, "--base-gpu-id", str(gpu)]
    words += ["--attention-backend", args.attention_backend, "--max-total-tokens", str(POOL_TOKENS)]
    words += ["--mem-fraction-static", "0.6" if len(set(args.gpus)) == 1 else "0.85"]
    if args.attention_backend == "triton":
        words += TRITON_ARGUMENTS
    return [*words, "--enable-specgen", "--specgen-evaluation-device", "cpu"] if flag else words


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="F")
    parser.add_argument("--model", type=Path, help="folder with config.json and a tokenizer; weights are random")
    parser.add_argument("--gpus", default="0", help="of the server without the flag, and of the one with: 0 or 0,1")
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=16, help="ordinary requests that run at a time")
    parser.add_argument("--searches", type=int, default=4, help="that reason beside them")
    parser.add_argument("--requests", type=int, default=64, help="of the recorded ones, at most 64")
    parser.add_argument("--budget-s", type=float, help="start no round that would end after so many seconds")
    args = parser.parse_args(arguments)
    for name in ("rounds", "at_once", "searches", "requests"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    try:
        args.gpus = [int(number) for number in args.gpus.split(",")]
    except ValueError:
        parser.error(f"--gpus {args.gpus!r}: write one number, or two with a comma between")
    args.fork_every = FORK_EVERY if args.model else CPU_FORK_EVERY
    return args


def report_of(args: argparse.Namespace, wanted: Sequence[Length], rounds: Sequence[Round]) -> dict[str, Any]:
    ratios = compared(rounds)
    return new_report("specgen.overhead/1", None, "bench.overhead") | {
        "kind": "real engine, random weights",
        "model": args.model.name if args.model else "tiny, CPU engine",
        "gpus": args.gpus if args.model else [],
        "requests": len(wanted),
        "prompt_tokens": sum(one.prompt for one in wanted),
        "output_tokens": sum(one.output for one in wanted),
        "at_once": args.at_once,
        "searches": args.searches,
        "fork": {"every": args.fork_every, "tokens": FORK_TOKENS},
        "rounds": [{name: figures(served) for name, served in one.items()} for one in rounds],
        "medians": medians(rounds),
        "ratios": ratios,
        "idle_throughput_at_least_0.99": ratios["idle/off"]["tokens_per_s"]["mean"] >= 0.99,
    }


def print_table(report: Mapping[str, Any]) -> None:
    columns = list(report["medians"]["forks"])
    print("\n".join(["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]))
    for name, row in report["medians"].items():
        print(f"| {name} | " + " | ".join(f"{row[one]:.2f}" if one in row else "-" for one in columns) + " |")
    for pair, row in report["ratios"].items():
        print(f"{pair}: " + ", ".join(f"{name} {interval(one)}" for name, one in row.items()))


def interval(one: Mapping[str, float]) -> str:
    return f"{one['mean']:.4f}" + (f" [{one['low']:.4f}, {one['high']:.4f}]" if "low" in one else "")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    wanted = lengths(1 if args.model else CPU_SHRINK)[: args.requests]
    try:
        if not args.json.resolve().parent.is_dir():
            raise SpecGenError(f"--json {args.json}: folder {args.json.parent} does not exist; make it first")
        with tempfile.TemporaryDirectory(prefix="specgen-bench-") as folder, servers(args, Path(folder)) as urls:
            rounds = asyncio.run(measure(urls, wanted, args))
    except (SpecGenError, RuntimeError) as error:
        print(f"bench.overhead: {error}", file=sys.stderr)
        return 2
    report = report_of(args, wanted, rounds)
    write_report(args.json, report)
    print_table(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
