"""Time from a request to a kernel that is good enough: sequential reasoning, SpecGen, and SpecGen without its parts.

    python -m bench.end_to_end --traces DIR... --gpus serve=0,eval=1,2,3 --model CONFIG --searches N --json F --plot P

Recorded reasoning is replayed through the real engine (random weights, recorded ids): decode speed is the engine's own;
compiling, checking, timing and profiling are real. Before each configuration every cache of builds and the radix tree
are emptied; each trace is played once in it, N at a time. A row is saved as soon as its search ends; --resume F goes on
with what is missing. Beside every gain stands the oracle's, at the decode rate measured in the sequential run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.e2e_configurations import CONFIGURATIONS, SEQUENTIAL, Configuration, chosen
from bench.e2e_plot import plot
from bench.e2e_report import mean, print_table, rate, summarise, tokens
from bench.e2e_searches import Play, empty_cache, play_phase, warm_up
from bench.e2e_servers import Gpus, Setup, server
from bench.machine import new_report, write_report
from bench.recordings import Measured, UsageError, read_scores, subject_of, tokenizer
from bench.service_times import ServiceTimes
from bench.virtual_time import Machine, oracle_seconds, sequential
from specgen_engine.controller.termination import Speedup
from specgen_engine.errors import SpecGenError
from specgen_engine.replay.trace import Trace, TraceError, load_traces

SCHEMA = "specgen.end_to_end/1"
HEADLINE = (SEQUENTIAL, "specgen", "no-early-end")


class Bench:
    """Plays what is missing from the report and keeps it on disk."""

    def __init__(self, args: argparse.Namespace, traces: list[Trace], setup: Setup, report: dict[str, Any]) -> None:
        self.args, self.traces, self.setup, self.report = args, traces, setup, report
        self.started = time.monotonic()

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.report["rows"]
        return rows

    def out_of_time(self) -> bool:
        return bool(self.args.budget_s and time.monotonic() - self.started > self.args.budget_s)

    def run(self, configurations: list[Configuration]) -> None:
        with tempfile.TemporaryDirectory(prefix="specgen-builds-") as folder:
            cache = Path(folder)
            for variant, group in groupby(configurations, lambda one: one.server):
                wanted = [one for one in group if self.missing(one)]
                if wanted and not self.out_of_time():
                    self.run_on_one_server(variant, wanted, cache)

    def run_on_one_server(self, variant: str, wanted: list[Configuration], cache: Path) -> None:
        say(f"starting a server: {variant}")
        with server(self.setup, variant, cache) as up:
            say(f"up in {up.startup_s:.0f} s")
            asyncio.run(warm_up(up.url, self.traces))
            say("every task is known to the evaluators")
            for one in wanted:
                if self.out_of_time():
                    return say(f"{one.name}: not run, {self.args.budget_s} s are over")
                for seed in self.args.seeds:
                    self.phase(up.url, one, seed, cache)

    def plays(self, one: Configuration, seed: int) -> list[Play]:
        """What of a configuration is not in the report yet."""
        found = []
        for trace in self.traces:
            if self.row(one.name, trace.name, seed) is None:
                alone = self.row(SEQUENTIAL, trace.name, seed)
                search = one.search(self.target_of(trace), tokens(alone) if alone else None)
                found.append(Play(trace, trace.iterations[0], search))
        return found

    def target_of(self, trace: Trace) -> float:
        """The criterion: an absolute speed-up, or --share-of-final of what scores.json says of the final answer."""
        if not self.args.share_of_final:
            return float(self.args.target)
        name = "/".join(trace.path.resolve().parts[-2:]) + f"/iter-{trace.iterations[0].number}/final.md"
        speedup = self.args.known.get(name, {}).get("speedup")
        if not speedup:
            raise SpecGenError(f"--share-of-final: {name} has no speed-up in --scores; leave the trace out")
        return float(self.args.share_of_final * speedup)

    def row(self, configuration: str, trace: str, seed: int) -> dict[str, Any] | None:
        key = (configuration, trace, seed)
        return next((one for one in self.rows if (one["configuration"], one["trace"], one["seed"]) == key), None)

    def missing(self, one: Configuration) -> bool:
        return any(self.row(one.name, trace.name, seed) is None for trace in self.traces for seed in self.args.seeds)

    def phase(self, url: str, one: Configuration, seed: int, cache: Path) -> None:
        plays = self.plays(one, seed)
        if not plays:
            return
        random.Random(seed).shuffle(plays)
        empty_cache(cache)
        done = asyncio.run(play_phase(url, one, plays, self.args.searches, seed, self.save))
        self.report["phases"].append(done)
        self.write()
        say(f"{one.name}, seed {seed}: {len(plays)} searches in {done['wall_s']:.1f} s")

    def save(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()
        kernel = f"{row['accepted']['speedup']:.2f}x" if row["accepted"] and row["accepted"]["speedup"] else "no kernel"
        say(
            f"  {row['configuration']} {row['trace']}: {row['client_s']:.1f} s, {row['reasoning_tokens']} of "
            f"{row['recorded_reasoning_tokens']} tokens at {rate(row):.0f}/s, {len(row['forks'])} forks, "
            f"{sum(one['verdict_s'] is not None for one in row['candidates'])} verdicts, {row['ended_by']}, {kernel}"
        )

    def write(self) -> None:
        self.report["wall_s"] = round(time.monotonic() - self.started, 1)
        write_report(self.args.json, self.report)


def say(text: str) -> None:
    print(text, flush=True)


def oracle_gains(
    report: dict[str, Any], traces: list[Trace], scores: dict[str, Any], target: float
) -> dict[str, float]:
    """By trace: what the first recorded fork that meets the target gains at sequential's measured decode rate."""
    encode, gains = tokenizer(), dict[str, float]()
    for trace in traces:
        played = [r for r in report["rows"] if r["configuration"] == SEQUENTIAL and r["trace"] == trace.name]
        if not played:
            continue
        machine = Machine(tokens_per_s=statistics.median(rate(row) for row in played), evaluators=report["evaluators"])
        recording = subject_of(trace, trace.iterations[0], Measured(scores, ServiceTimes()), encode).recording
        ideal, alone = oracle_seconds(recording, machine, Speedup(target)), sequential(recording, machine).seconds
        gains[trace.name] = max(1.0, alone / ideal) if ideal else 1.0
    return gains


def finish(report: dict[str, Any], traces: list[Trace], scores: dict[str, Any]) -> None:
    """Fill in the summary from the rows."""
    lines = summarise(report["rows"], report["phases"], report["evaluators"], report["target"])
    if scores:
        gains = report["oracle"] = oracle_gains(report, traces, scores, report["target"])
        for line in lines:
            line["oracle_gain"] = mean(gains.get(one["trace"]) for one in line["by_trace"])
            line["share_of_oracle"] = line["gain"] / line["oracle_gain"] if line["oracle_gain"] else None
    report["summary"] = lines


def open_report(args: argparse.Namespace, traces: list[Trace], gpus: Gpus) -> dict[str, Any]:
    """A new one, or the one to go on with. Raises SpecGenError when that is of other conditions."""
    conditions = {
        "gpus": args.gpus,
        "evaluators": gpus.evaluators,
        "model": args.model.name if args.model else "tiny",
        "searches": args.searches,
        "target": args.target,
        "share_of_final": args.share_of_final,
        "tier": args.tier,
        "profile": args.profile,
        "traces": {trace.name: trace.digest()[:16] for trace in traces},
    }
    if args.resume is None:
        return {
            **new_report(SCHEMA, args.seeds[0], "bench.end_to_end"), "kind": "replayed through the real engine",
            **conditions, "phases": [], "rows": [],
        }  # fmt: skip
    try:
        report: dict[str, Any] = json.loads(args.resume.read_text())
    except (OSError, ValueError) as error:
        raise SpecGenError(f"--resume {args.resume}: not readable ({error}); give a report of this bench") from None
    if report.get("schema") != SCHEMA:
        raise SpecGenError(f"--resume {args.resume}: is no {SCHEMA} report")
    for name, value in conditions.items():
        if name == "traces":
            value = {**report["traces"], **value}
            conditions[name] = value
        elif report.get(name) != value:
            raise SpecGenError(f"--resume {args.resume}: its {name} is {report.get(name)!r}, not {value!r}; start anew")
    return {**report, "traces": conditions["traces"]}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gpus", required=True, help="serve=0,eval=1,2,3; the same number twice shares a GPU; or cpu")
    parser.add_argument("--model", type=Path, help="folder with config.json and a tokenizer; weights are random")
    parser.add_argument("--searches", type=int, default=8, metavar="N", help="at once")
    parser.add_argument("--json", type=Path, required=True, metavar="F")
    parser.add_argument("--plot", type=Path, metavar="F.png")
    parser.add_argument("--resume", type=Path, metavar="F", help="go on with this report")
    parser.add_argument(
        "--configurations", nargs="+", default=list(HEADLINE), metavar="NAME", help=", ".join(CONFIGURATIONS)
    )
    parser.add_argument("--target", type=float, default=1.5, help="speed-up over eager PyTorch that ends a reasoning")
    parser.add_argument(
        "--share-of-final", type=float, default=0.0, help="instead: of each trace's final answer's speed-up"
    )
    parser.add_argument("--scores", nargs="*", default=[], metavar="F", help="scores.json files, for the oracle")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="orders of the searches")
    parser.add_argument("--tier", choices=("peer", "host", "off"), default="off")
    parser.add_argument("--profile", default="off", help="how correct candidates are profiled (auto, ncu, cupti, ...)")
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--pool-tokens", type=int, help="size of the KV pool (default: what fits)")
    parser.add_argument("--workers", type=int, default=6, help="evaluations at once on each evaluator")
    parser.add_argument("--budget-s", type=float, help="start no configuration after so many seconds")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: temporary)")
    args = parser.parse_args(arguments)
    for name, low in (("searches", 1), ("workers", 1), ("target", 0.0), ("share_of_final", 0.0)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: use {low} or more")
    return args


def run(args: argparse.Namespace) -> None:
    gpus, traces, configurations = Gpus.parse(args.gpus), load_traces(args.traces), chosen(args.configurations)
    args.known = read_scores(args.scores)
    for file in (args.json, args.plot):
        if file is not None and not file.resolve().parent.is_dir():
            raise SpecGenError(f"{file}: folder {file.parent} does not exist; make it first")
    names = [trace.name for trace in traces]
    if len(set(names)) != len(names):
        raise SpecGenError(f"--traces: two are called the same among {', '.join(sorted(names))}")
    report = open_report(args, traces, gpus)
    with tempfile.TemporaryDirectory(prefix="specgen-logs-") as scratch:
        setup = Setup(
            args.model, tuple(trace.path for trace in traces), gpus, args.logs or Path(scratch), args.workers,
            args.attention_backend, args.profile, args.pool_tokens, tier=args.tier,
        )  # fmt: skip
        bench = Bench(args, traces, setup, report)
        bench.run(configurations)
    finish(report, traces, args.known)
    bench.write()
    print_table(report["summary"])
    if args.plot is not None and report["summary"]:
        plot(report, args.plot)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        run(args)
    except (SpecGenError, TraceError, UsageError) as error:
        print(f"bench.end_to_end: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
