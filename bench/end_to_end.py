"""Time from a request to a kernel that is good enough: sequential reasoning, SpecGen, and SpecGen without its parts.

    python -m bench.end_to_end --traces DIR... --gpus serve=0,eval=1,2,3 --model CONFIG --searches N --json F --plot P

Recorded reasoning is replayed through the real engine (random weights, recorded ids): decode speed is the engine's own;
compiling, checking, timing and profiling are real. Before each configuration every cache of builds and the radix tree
are emptied; each trace is played once in it, N at a time. A row is saved as soon as its search ends, with its commit
and date; --resume F goes on with what is missing; --budget-s ends in time and says what was left out. --iterations all
plays the iterations of a trace one after the other, as one search. Beside every gain stand the oracle's, at the decode
rate measured in the sequential run, and what is left of it when sequential's compiling is taken to be free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.e2e_budget import longest_first, measured_rate, tokens_of, why_left_out
from bench.e2e_configurations import CONFIGURATIONS, SEQUENTIAL, Configuration, chosen
from bench.e2e_oracle import name_kinds, oracle_gains, recorded
from bench.e2e_plot import plot
from bench.e2e_report import key_of, label, mean, rate, summarise, tokens
from bench.e2e_runs import runs
from bench.e2e_searches import Limits, Play, empty_cache, play_phase, warm_up
from bench.e2e_servers import Gpus, Setup, server
from bench.e2e_table import markdown, print_table
from bench.machine import commit, describe_machine, new_report, write_report
from bench.recordings import UsageError, folder_of, read_scores, tokenizer
from specgen_engine.controller.termination import parse_termination
from specgen_engine.errors import SpecGenError
from specgen_engine.replay.trace import Iteration, Trace, TraceError, load_traces

SCHEMA = "specgen.end_to_end/1"
ALL = "all"
BEFORE_IT_WAS_SAID = {"iterations": "1", "workers": 6, "attention_backend": "triton", "pool_tokens": None}
# Drivers, kernels and a host's number of GPUs may differ from one lease to the next; the rows' date tells.
SAME_MACHINE = ("gpu", "cpu", "cpus", "torch", "sglang")
HEADLINE = (SEQUENTIAL, "specgen", "no-early-end")


class Bench:
    """Plays what is missing from the report and keeps it on disk."""

    def __init__(self, args: argparse.Namespace, traces: list[Trace], setup: Setup, report: dict[str, Any]) -> None:
        self.args, self.traces, self.setup, self.report = args, traces, setup, report
        self.started, self.before_s = time.monotonic(), report.get("wall_s", 0.0)
        self.deadline = math.inf if args.budget_s is None else self.started + args.budget_s
        self.origin = {"commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.reasoning_tokens: dict[str, int] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.report["rows"]
        return rows

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, configurations: list[Configuration]) -> None:
        if self.left_s() <= 0 or not any(map(self.missing, configurations)):
            return
        refuse_other_machine(self.report)
        # A worker outlives its server by moments and may still be tidying its build: that must not cost the report.
        with tempfile.TemporaryDirectory(prefix="specgen-builds-", ignore_cleanup_errors=True) as folder:
            cache = Path(folder)
            for variant, group in groupby(configurations, lambda one: one.server):
                wanted = [one for one in group if self.missing(one)]
                if wanted and self.left_s() > 0:
                    self.run_on_one_server(variant, wanted, cache)

    def run_on_one_server(self, variant: str, wanted: list[Configuration], cache: Path) -> None:
        say(f"starting a server: {variant}")
        with server(self.setup, variant, cache) as up:
            say(f"up in {up.startup_s:.0f} s")
            self.reasoning_tokens = asyncio.run(warm_up(up.url, self.traces))
            say("every task is known to the evaluators")
            for one in wanted:
                if self.left_s() <= 0:
                    return say(f"{one.name}: not run, {self.args.budget_s} s are over")
                for seed in self.args.seeds:
                    self.phase(up.url, one, seed, cache)

    def chains(self, one: Configuration, seed: int) -> list[list[Play]]:
        """By trace, what of a configuration is not in the report yet: its iterations, one after the other."""
        found = []
        for trace in self.traces:
            chain = []
            for iteration in played(trace, self.args.iterations):
                alone = self.row(SEQUENTIAL, trace.name, iteration.number, seed)
                if self.row(one.name, trace.name, iteration.number, seed) is None:
                    search = one.search(self.criterion_of(trace, iteration), tokens(alone) if alone else None)
                    chain.append(Play(trace, iteration, search))
            if chain and (one.name == SEQUENTIAL or not self.was_left_out(trace.name, seed)):
                found.append(chain)
        return found

    def was_left_out(self, trace: str, seed: int) -> bool:
        """Whether sequential ran out of time on it: nothing could be compared."""
        left = self.report["left_out"]
        return any((r["configuration"], r["trace"], r["seed"]) == (SEQUENTIAL, trace, seed) for r in left)

    def criterion_of(self, trace: Trace, iteration: Iteration) -> str:
        """--criterion; else an absolute speed-up, or --share-of-final of what scores.json says of the final answer."""
        if self.args.criterion:
            return str(self.args.criterion)
        if not self.args.share_of_final:
            return f"speedup:{self.args.target:.4g}"
        name = f"{folder_of(trace, iteration)}/final.md"
        speedup = self.args.known.get(name, {}).get("speedup")
        if not speedup:
            raise SpecGenError(f"--share-of-final: {name} has no speed-up in --scores; leave the trace out")
        return f"speedup:{self.args.share_of_final * speedup:.4g}"

    def row(self, configuration: str, trace: str, iteration: int, seed: int) -> dict[str, Any] | None:
        wanted = (configuration, (trace, iteration, seed))
        return next((one for one in self.rows if (one["configuration"], key_of(one)) == wanted), None)

    def missing(self, one: Configuration) -> bool:
        keys = {key_of(row) for row in self.rows if row["configuration"] == one.name}
        return any(
            (trace.name, iteration.number, seed) not in keys
            for trace in self.traces
            for iteration in played(trace, self.args.iterations)
            for seed in self.args.seeds
        )

    def phase(self, url: str, one: Configuration, seed: int, cache: Path) -> None:
        before = self.report["left_out"]
        self.report["left_out"] = [it for it in before if (it["configuration"], it["seed"]) != (one.name, seed)]
        chains = self.chains(one, seed)
        if not chains:
            return
        random.Random(seed).shuffle(chains)
        chains = longest_first(chains, lambda chain: sum(self.tokens_of(play) for play in chain))
        empty_cache(cache)
        limits = Limits(
            self.args.searches, self.deadline, lambda play: self.why_not(one, play),
            lambda play, why: self.leave_out(one, seed, play, why),
        )  # fmt: skip
        done = asyncio.run(play_phase(url, one, chains, seed, limits, self.save))
        done["engine_gpus"] = 0 if self.setup.gpus.serve is None else 1
        self.report["phases"].append(done | self.origin)
        self.write()
        say(f"{one.name}, seed {seed}: {done['searches']} searches in {done['wall_s']:.1f} s")

    def tokens_of(self, play: Play) -> float:
        return tokens_of(play.trace, play.iteration, self.reasoning_tokens[play.trace.name])

    def why_not(self, one: Configuration, play: Play) -> str | None:
        """An early end may come at any time, so only a reasoning that runs to its end is known not to fit."""
        whole = 0.0 if one.early_end else self.tokens_of(play)
        return why_left_out(whole, measured_rate(self.rows), self.left_s())

    def leave_out(self, one: Configuration, seed: int, play: Play, why: str) -> None:
        """Said, kept in the report, and not counted."""
        row = {"trace": play.trace.name, "iteration": play.iteration.number, "seed": seed}
        self.report["left_out"].append({"configuration": one.name, **row, "why": why})
        say(f"  {one.name} {label(row)}: left out, {why}")

    def save(self, row: dict[str, Any]) -> None:
        self.rows.append(row | self.origin)
        self.write()
        kernel = f"{row['accepted']['speedup']:.2f}x" if row["accepted"] and row["accepted"]["speedup"] else "no kernel"
        say(
            f"  {row['configuration']} {label(row)}: {row['client_s']:.1f} s, {row['reasoning_tokens']} of "
            f"{row['recorded_reasoning_tokens']} tokens at {rate(row):.0f}/s, {len(row['forks'])} forks, "
            f"{sum(one['verdict_s'] is not None for one in row['candidates'])} verdicts, {row['ended_by']}, {kernel}"
        )

    def write(self) -> None:
        self.report["wall_s"] = round(self.before_s + time.monotonic() - self.started, 1)
        write_report(self.args.json, self.report)


def played(trace: Trace, iterations: str) -> tuple[Iteration, ...]:
    """The first so many of a trace's iterations, or all."""
    return trace.iterations if iterations == ALL else trace.iterations[: int(iterations)]


def say(text: str) -> None:
    print(text, flush=True)


def finish(report: dict[str, Any], traces: list[Trace], scores: dict[str, Any]) -> None:
    """Fill in the summary from the rows."""
    found = [(trace, iteration) for trace in traces for iteration in played(trace, report["iterations"])]
    name_kinds(report["rows"], recorded(found))
    lines = summarise(report["rows"], report["phases"], report["evaluators"], report["target"])
    if scores:
        gains = report["oracle"] = oracle_gains(report, found, scores, tokenizer())
        for line in lines:
            for one in line["by_trace"]:
                one["oracle_gain"] = gains.get(label(one))
            line["oracle_gain"] = mean(one["oracle_gain"] for one in line["by_trace"])
            line["share_of_oracle"] = line["gain"] / line["oracle_gain"] if line["oracle_gain"] else None
    report["summary"], report["runs"] = lines, runs(report["rows"])


def open_report(args: argparse.Namespace, traces: list[Trace], gpus: Gpus) -> dict[str, Any]:
    """A new one, or the one to go on with. Raises SpecGenError when that is of other conditions."""
    conditions = {
        "gpus": args.gpus,
        "evaluators": gpus.evaluators,
        "model": args.model.name if args.model else "tiny",
        "searches": args.searches,
        "target": args.target,
        "share_of_final": args.share_of_final,
        "criterion": args.criterion,
        "tier": args.tier,
        "profile": args.profile,
        "iterations": args.iterations,
        "workers": args.workers,
        "attention_backend": args.attention_backend,
        "pool_tokens": args.pool_tokens,
        "traces": {trace.name: trace.digest()[:16] for trace in traces},
    }
    if args.resume is None:
        return {
            **new_report(SCHEMA, args.seeds[0], "bench.end_to_end"), "kind": "replayed through the real engine",
            **conditions, "phases": [], "rows": [], "left_out": [],
        }  # fmt: skip
    try:
        report: dict[str, Any] = json.loads(args.resume.read_text())
    except (OSError, ValueError) as error:
        raise SpecGenError(f"--resume {args.resume}: not readable ({error}); give a report of this bench") from None
    if report.get("schema") != SCHEMA:
        raise SpecGenError(f"--resume {args.resume}: is no {SCHEMA} report")
    for name, value in BEFORE_IT_WAS_SAID.items():
        report.setdefault(name, value)
    for name, value in conditions.items():
        if name == "traces":
            value = {**report["traces"], **value}
            conditions[name] = value
        elif report.get(name) != value:
            raise SpecGenError(f"--resume {args.resume}: its {name} is {report.get(name)!r}, not {value!r}; start anew")
    for row in report["rows"]:
        row.setdefault("commit", report.get("commit"))
        row.setdefault("date", report["machine"]["date"])
    kept = {
        name: [one for one in report.get(name, []) if one["configuration"] not in args.again]
        for name in ("rows", "phases", "left_out")
    }
    return {**report, **kept, "traces": conditions["traces"]}


def refuse_other_machine(report: dict[str, Any]) -> None:
    """Rows of two machines side by side would say nothing. Raises SpecGenError."""
    if not report["rows"]:
        return
    then, now = report["machine"], describe_machine()
    for name in SAME_MACHINE:
        # torch says 2.11.0+cu130 of itself once it is imported, and 2.11.0 before.
        was, found = (str(machine.get(name)).partition("+")[0] for machine in (then, now))
        if was != found:
            raise SpecGenError(f"--resume: its rows were played with {name} {was!r}, here it is {found!r}; start anew")


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
    parser.add_argument("--markdown", type=Path, metavar="F.md", help="the tables, for a README")
    parser.add_argument("--resume", type=Path, metavar="F", help="go on with this report")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="NAME", help="configurations whose rows in --resume's are dropped"
    )
    parser.add_argument(
        "--configurations", nargs="+", default=list(HEADLINE), metavar="NAME", help=", ".join(CONFIGURATIONS)
    )
    parser.add_argument("--target", type=float, default=1.5, help="speed-up over eager PyTorch that ends a reasoning")
    parser.add_argument(
        "--share-of-final", type=float, default=0.0, help="instead: of each trace's final answer's speed-up"
    )
    parser.add_argument("--criterion", metavar="SPEC", help="instead: what ends a reasoning, e.g. gain:0.3")
    parser.add_argument("--scores", nargs="*", default=[], metavar="F", help="scores.json files, for the oracle")
    parser.add_argument("--iterations", default="1", metavar="N|all", help="of each trace, one after the other")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="orders of the searches")
    parser.add_argument("--tier", choices=("peer", "host", "off"), default="off")
    parser.add_argument("--profile", default="off", help="how correct candidates are profiled (auto, ncu, cupti, ...)")
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--pool-tokens", type=int, help="size of the KV pool (default: what fits)")
    parser.add_argument("--workers", type=int, default=6, help="evaluations at once on each evaluator")
    parser.add_argument(
        "--budget-s", type=float, help="end after so many seconds (0: play nothing); the rest is left out"
    )
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: temporary)")
    args = parser.parse_args(arguments)
    for name, low in (("searches", 1), ("workers", 1), ("target", 0.0), ("share_of_final", 0.0)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: use {low} or more")
    if args.iterations != ALL and (not args.iterations.isdigit() or int(args.iterations) < 1):
        parser.error(f"--iterations {args.iterations}: use a number of 1 or more, or all")
    if args.again and (args.resume is None or args.resume.resolve() == args.json.resolve()):
        parser.error("--again drops rows of --resume F: give one, and --json another file than F")
    if unknown := [name for name in args.again if name not in args.configurations]:
        parser.error(f"--again {' '.join(unknown)}: name it in --configurations, too")
    return args


def run(args: argparse.Namespace) -> None:
    gpus, traces, configurations = Gpus.parse(args.gpus), load_traces(args.traces), chosen(args.configurations)
    args.known = read_scores(args.scores)
    if args.criterion:
        try:
            parse_termination(args.criterion, "--criterion")
        except ValueError as error:
            raise SpecGenError(str(error)) from None
    for file in (args.json, args.plot, args.markdown):
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
    write_report(args.json, report)
    print_table(report)
    if args.markdown is not None:
        args.markdown.write_text(markdown(report))
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
