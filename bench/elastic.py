"""The elastic scheduler against every static split and FIFO, simulated with the policy that the live pool runs.

    python -m bench.elastic [--quick] --seed N --json F --plot F.png [--scores scores.json]
    python -m bench.elastic --live ...    one burst on live workers beside the simulator (bench/elastic_live.py)

Every policy sees the same candidates (bench/elastic_workload.py). Static splits and FIFO serve in order of arrival;
elastic runs one configuration for all scenarios. Admission is off: it would spare elastic alone what comes too late.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.elastic_sim import Result, simulate
from bench.elastic_workload import SCENARIOS, ServiceError, ServiceFit, fit_scores, workload
from bench.machine import new_report, write_report
from specgen_engine.pools.policy import PolicyConfig

SCHEMA = "specgen.elastic/1"
FIVE = ("steady-validate", "steady-profile", "bursts", "on-off", "ramp")
BASELINE = (
    "utilisation",
    "utilisation_whole",
    "utilisation_useful",
    "p50_feedback_s",
    "p95_feedback_s",
    "min_share",
    "switches_per_gpu_s",
    "decision_us",
)
ALL_SPLITS = 16
MANY_SEARCHES = 512
GOALS = {
    "utilisation": ">= 0.97",
    "p95_over_best_static": "<= 1.02",
    "median_static_over_p95": ">= 2",
    "min_share": ">= 0.5 with 512 searches",
    "switch_gap_s": ">= 2",
    "decision_p99_us": "<= 1000",
}


class Case(NamedTuple):
    """A scenario at a size. splits: static splits simulated beside elastic and FIFO, None for all (or a sample)."""

    scenario: str
    gpus: int
    searches: int
    seeds: int
    length_s: float = 600.0
    splits: int | None = None


QUICK = [
    *(Case(name, 16, 64, 6) for name in FIVE),
    *(Case(name, 8, 32, 12) for name in FIVE),
    Case("steady-validate", 1, 1, 5),
    Case("contended", 64, 512, 1, splits=1),
    Case("contended", 1024, 512, 1, length_s=120.0, splits=0),
]
FULL = [
    *(Case(name, 16, 64, 20) for name in FIVE),
    *(Case(name, gpus, searches, 20) for gpus, searches in ((1, 1), (2, 8), (4, 16), (8, 8)) for name in FIVE),
    *(Case(name, 64, 256, 3, length_s=300.0, splits=7) for name in FIVE),
    Case("contended", 64, 512, 5, splits=1),
    Case("steady-validate", 1024, 512, 1, length_s=150.0, splits=1),
    Case("contended", 1024, 512, 1, length_s=200.0, splits=0),
]


def policies(gpus: int, splits: int | None = None) -> list[str]:
    """Elastic, FIFO and the static splits: all to 16 GPUs, above as many as asked for (7 unless told), evenly."""
    if gpus <= ALL_SPLITS and splits is None:
        validate: Iterable[int] = range(1, gpus)
    else:
        count = 7 if splits is None else splits
        validate = sorted({round(gpus * (index + 1) / (count + 1)) for index in range(count)})
    return ["elastic", "fifo", *(f"static-{one}-{gpus - one}" for one in validate)]


def rows_of(case: Case, first_seed: int, fit: ServiceFit, config: PolicyConfig) -> list[dict[str, Any]]:
    rows = []
    for seed in range(first_seed, first_seed + case.seeds):
        load = workload(SCENARIOS[case.scenario], case.gpus, case.searches, seed, case.length_s, fit)
        for policy in policies(case.gpus, case.splits):
            result = simulate(load, policy, config)
            head = {"name": case.scenario, "gpus": case.gpus, "searches": case.searches, "seed": seed, "policy": policy}
            kept = result._asdict() if policy == "elastic" else {name: getattr(result, name) for name in BASELINE}
            rows.append(head | {name: _number(value) for name, value in kept.items()})
    return rows


def _number(value: float) -> float | None:
    """Four significant digits; null for what never happened (no two switches of any GPU)."""
    return None if math.isinf(value) else float(f"{value:.4g}")


def summarise(case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds, elastic against the static splits, and whether each goal is met (null: it doesn't apply)."""
    medians = {policy: _median(rows, policy) for policy in dict.fromkeys(row["policy"] for row in rows)}
    elastic = medians["elastic"]
    static = {policy: row["p95_feedback_s"] for policy, row in medians.items() if policy.startswith("static")}
    best = min(static, key=lambda policy: static[policy]) if static else None
    gaps = [row["switch_gap_s"] for row in rows if row["policy"] == "elastic" and row["switch_gap_s"] is not None]
    out = {
        "name": case.scenario, "gpus": case.gpus, "searches": case.searches, "seeds": case.seeds,
        **{name: elastic[name] for name in Result._fields if name != "switch_gap_s"},
        "switch_gap_s": min(gaps, default=None),
        "fifo_p95_feedback_s": medians["fifo"]["p95_feedback_s"],
        "fifo_utilisation": medians["fifo"]["utilisation"],
        "fifo_min_share": medians["fifo"]["min_share"],
        "best_static": best,
        "best_static_p95_s": static[best] if best else None,
        "p95_over_best_static": elastic["p95_feedback_s"] / static[best] if best else None,
        "median_static_over_p95": statistics.median(static.values()) / elastic["p95_feedback_s"] if static else None,
    }  # fmt: skip
    all_splits = case.gpus <= ALL_SPLITS or (case.splits or 0) >= 7
    gap = out["switch_gap_s"]
    out["goals"] = {
        "utilisation": out["utilisation"] >= 0.97,
        "p95_over_best_static": out["p95_over_best_static"] <= 1.02 if best and all_splits else None,
        "median_static_over_p95": out["median_static_over_p95"] >= 2 if len(static) >= 3 and all_splits else None,
        "min_share": out["min_share"] >= 0.5 if case.searches >= MANY_SEARCHES else None,
        "switch_gap_s": gap >= 2.0 if gap is not None else None,
        "decision_p99_us": out["decision_p99_us"] <= 1000,
    }
    return out


def _median(rows: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    own = [row for row in rows if row["policy"] == policy]
    return {
        name: statistics.median(row[name] for row in own)
        for name in Result._fields
        if all(row.get(name) is not None for row in own)
    }


def print_table(summary: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="elastic, medians over seeds; missed goals in brackets", title_justify="left")
    for name in ("scenario", "gpus", "searches", "seeds", "util", "held", "whole", "useful", "p50 s", "p95 s", "fifo",
                 "best static", "/best", "median/", "share", "switch/GPU s", "us p99"):  # fmt: skip
        table.add_column(name, justify="left" if name == "scenario" else "right")

    def show(row: dict[str, Any], name: str, form: str, goal: str = "") -> str:
        text = "-" if row[name] is None else format(row[name], form)
        return f"({text})" if row["goals"].get(goal) is False else text

    for row in summary:
        table.add_row(
            row["name"], str(row["gpus"]), str(row["searches"]), str(row["seeds"]),
            show(row, "utilisation", ".3f", "utilisation"), show(row, "utilisation_held", ".3f"),
            show(row, "utilisation_whole", ".2f"), show(row, "utilisation_useful", ".2f"),
            show(row, "p50_feedback_s", ".1f"), show(row, "p95_feedback_s", ".1f"),
            show(row, "fifo_p95_feedback_s", ".1f"), (row["best_static"] or "-").removeprefix("static-"),
            show(row, "p95_over_best_static", ".3f", "p95_over_best_static"),
            show(row, "median_static_over_p95", ".2f", "median_static_over_p95"),
            show(row, "min_share", ".2f", "min_share"), show(row, "switches_per_gpu_s", ".3f", "switch_gap_s"),
            show(row, "decision_p99_us", ".0f", "decision_p99_us"),
        )  # fmt: skip
    Console(width=180).print(table)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """One row a line, written whole or not at all."""
    head = {name: value for name, value in report.items() if name not in ("scenarios", "summary")}
    text = json.dumps(head, indent=1)[:-2]
    for name in ("summary", "scenarios"):
        lines = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in report[name])
        text += f',\n "{name}": [\n  {lines}\n ]'
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n}\n")
    os.replace(partial, path)


def plot(path: Path, rows: list[dict[str, Any]], summary: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpus = max(row["gpus"] for row in summary if row["name"] in FIVE and row["gpus"] <= ALL_SPLITS)
    cases = [row for row in summary if row["name"] in FIVE and row["gpus"] == gpus]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2))
    for place, case in enumerate(cases):
        own = [row for row in rows if (row["name"], row["gpus"]) == (case["name"], case["gpus"])]
        medians = {policy: _median(own, policy)["p95_feedback_s"] for policy in dict.fromkeys(r["policy"] for r in own)}
        static = [value for policy, value in medians.items() if policy.startswith("static")]
        left.scatter([place] * len(static), static, color="grey", s=14, label="static splits" if not place else None)
        left.scatter(place, medians["fifo"], color="tab:orange", marker="s", label="fifo" if not place else None)
        left.scatter(place, medians["elastic"], color="tab:blue", marker="D", label="elastic" if not place else None)
    names = [f"{case['name']}\n{case['gpus']} GPUs" for case in cases]
    left.set(yscale="log", ylabel="p95 feedback latency, s", title="Feedback: compiled to judged, median over seeds")
    left.set_xticks(range(len(names)), names, fontsize=8)
    left.legend()
    kinds = (("utilisation", "while work waits"), ("utilisation_whole", "whole run"), ("utilisation_useful", "useful"))
    for shift, (name, label) in enumerate(kinds):
        right.bar(
            [place + 0.27 * (shift - 1) for place in range(len(cases))], [c[name] for c in cases], 0.26, label=label
        )
    right.axhline(0.97, color="black", linewidth=0.8, linestyle="--")
    right.set(ylim=(0, 1.15), title="Busy share of the GPUs, elastic")
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.legend(loc="upper right", ncols=3, fontsize=8)
    figure.tight_layout()
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    os.replace(partial, path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    plain = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="bench.elastic", description=__doc__, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and seeds: about a minute")
    parser.add_argument("--seed", type=int, default=0, help="first seed; the others follow it")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="write the figure here (.png, .pdf, .svg)")
    parser.add_argument(
        "--scores", type=Path, help="fit service times to this scores.json (default: the fitted constants)"
    )
    parser.add_argument(
        "--switch-s", type=float, default=PolicyConfig().switch_s, help="seconds that a role switch takes"
    )
    parser.add_argument("--seeds", type=int, help="seeds a case, instead of each case's own number")
    live = parser.add_argument_group("--live")
    live.add_argument("--live", action="store_true", help="run a burst on live workers and simulate it")
    live.add_argument("--devices", default="cpu,cpu", help="one worker each: cpu or cuda:N, on two GPUs or more")
    live.add_argument("--traces", type=Path, help="recorded answers (Triton ones are taken); default: synthetic ones")
    live.add_argument("--only", default="", help="regular expression on an answer's path")
    live.add_argument("--count", type=int, default=30, help="candidates")
    live.add_argument("--bursts", type=int, default=2, help="that they arrive in, each within a second")
    live.add_argument("--gap-s", type=float, default=8.0, help="from one burst to the next")
    live.add_argument("--profile-stage", choices=("time", "profile"), default="time")
    options = parser.parse_args(arguments)
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name} {path}: its folder does not exist; make it first")
    if options.plot is not None and options.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot {options.plot}: use a name that ends in .png, .pdf or .svg")
    devices = options.devices.split(",")
    places = devices.count("cpu") + len({device for device in devices if device != "cpu"})
    if options.live and (options.count < 2 or options.bursts < 1 or places < 2):
        parser.error("--live: use at least two devices, two candidates and one burst")
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: use at least 1")
    return options


def run_live(options: argparse.Namespace) -> int:
    from bench import elastic_live
    from specgen_engine.evaluation.limits import EvaluationLimits
    from specgen_engine.pools.base import JobStage

    how = options.count, options.bursts, options.gap_s, options.seed
    on_cpu = options.devices.startswith("cpu")
    limits = EvaluationLimits(check_seeds=1, timing_budget_s=0.03, precision=1.0) if on_cpu else EvaluationLimits()
    try:
        arrivals = (
            elastic_live.recorded(options.traces, options.only, *how)
            if options.traces
            else elastic_live.synthetic(*how)
        )
        found = elastic_live.compare(arrivals, options.devices.split(","), JobStage(options.profile_stage), limits)
    except (ValueError, RuntimeError) as error:
        print(f"bench.elastic: {error}", file=sys.stderr)
        return 2
    print("\n".join(elastic_live.lines(found)))
    if options.json:
        write_report(options.json, new_report("specgen.elastic-live/1", options.seed) | found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.live:
        return run_live(options)
    try:
        fit = fit_scores(options.scores) if options.scores else ServiceFit()
        config = replace(PolicyConfig(), switch_s=options.switch_s)
    except (ServiceError, ValueError) as error:
        print(f"bench.elastic: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    summary = []
    for case in QUICK if options.quick else FULL:
        case = case._replace(seeds=options.seeds or case.seeds)
        own = rows_of(case, options.seed, fit, config)
        rows += own
        summary.append(summarise(case, own))
    print_table(summary)
    if options.json:
        head = new_report(SCHEMA, options.seed)
        head |= {"quick": options.quick, "policy_config": asdict(config), "service": asdict(fit), "goals": GOALS}
        write_json(options.json, head | {"summary": summary, "scenarios": rows})
    if options.plot:
        plot(options.plot, rows, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
