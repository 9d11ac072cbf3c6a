"""Tables of bench.end_to_end: on the terminal, and as Markdown for a README.

python -m bench.e2e_table bench/results/end_to_end_2xH200.json > tables.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.e2e_configurations import SEQUENTIAL
from bench.e2e_report import label, summarise

Line = Mapping[str, Any]
Columns = dict[str, Callable[[Line], str]]


def plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def curve(shares: Mapping[str, float | None]) -> str:
    return " / ".join(plain(value) for value in shares.values())


def spread(by_seed: Mapping[str, float | None]) -> str:
    """Least and most of several seeds."""
    values = [value for value in by_seed.values() if value is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "-"


def used(line: Line, kind: str) -> str:
    return percent(line["evaluators"].get(kind)) if line.get("evaluators") else ""


def gpu_seconds(line: Line) -> str:
    """Of the engine and of the evaluators, over whole phases."""
    spent = line.get("evaluators")
    return f"{spent['engine_gpu_seconds']:.0f} / {sum(spent['gpu_seconds'].values()):.0f}" if spent else ""


def paused(line: Line) -> str:
    """Seconds of a shared GPU's engine; empty where it never stood still."""
    seconds = (line.get("evaluators") or {}).get("engine_paused_s", 0.0)
    return f"{seconds:.0f}" if seconds else ""


def moved_gb(line: Line) -> str:
    """Written to the KV tier and read back from it, GB; empty without one."""
    kv = (line.get("evaluators") or {}).get("kv") or {}
    return f"{kv['written_bytes'] / 1e9:.1f} / {kv['restored_bytes'] / 1e9:.1f}" if kv else ""


def beside(line: Line, kind: str) -> str:
    """A figure that compares with sequential: of itself it says nothing."""
    return "-" if line["configuration"] == SEQUENTIAL else plain(line.get(kind))


NAME: Columns = {"configuration": lambda x: x["configuration"], "group": lambda x: x["group"]}
TIME: Columns = {
    **NAME,
    "met": lambda x: f"{x['met']}/{x['traces']}",
    "gain": lambda x: plain(x["gain"]),
    "sequential's compiling free": lambda x: beside(x, "gain_floor"),
    "seeds": lambda x: spread(x["gain_by_seed"]),
    "oracle": lambda x: beside(x, "oracle_gain"),
    "of the oracle": lambda x: "-" if x["configuration"] == SEQUENTIAL else percent(x.get("share_of_oracle")),
    "least gain": lambda x: plain(x["worst_gain"]),
    "time / sequential": lambda x: plain(x["time_over_sequential"]),
    "longest": lambda x: plain(x["worst_time_over_sequential"]),
    "accepted / final": lambda x: plain(x["accepted_over_final"]),
    "best at 25 / 50 / 75 / 100 % of its time": lambda x: curve(x["best_by_time"]),
    "of its tokens": lambda x: curve(x["best_by_tokens"]),
}
FEEDBACK: Columns = {
    **NAME,
    "correct": lambda x: str(x["feedback"]["correct"]),
    "with profile": lambda x: str(x["feedback"]["profiled"]),
    "correct / min": lambda x: plain(x["feedback"]["correct_per_minute"]),
    "x sequential": lambda x: plain(x["feedback_over_sequential"]["correct_per_minute"]),
    "correct / min of the phase": lambda x: plain((x.get("evaluators") or {}).get("correct_per_wall_minute")),
    "correct / 1k tokens": lambda x: f"{x['feedback']['correct_per_1000_tokens']:.3f}",
    "x sequential ": lambda x: plain(x["feedback_over_sequential"]["correct_per_1000_tokens"]),
    "verdict p50 / p95 s": lambda x: (
        f"{plain(x['feedback']['latency_p50_s'])} / {plain(x['feedback']['latency_p95_s'])}"
    ),
    "busy": lambda x: used(x, "busy"),
    "busy while work waits": lambda x: used(x, "busy_while_waiting"),
    "held": lambda x: used(x, "held"),
    "useful": lambda x: used(x, "useful"),
}
COST: Columns = {
    **NAME,
    "base tokens/s": lambda x: f"{x['tokens_per_s']:.0f}",
    "base slowed by": lambda x: percent(x["base_slowdown"]),
    "at most": lambda x: percent(x["worst_base_slowdown"]),
    "reasoning": lambda x: str(x["tokens"]["reasoning"] + x["tokens"]["answer"]),
    "fork": lambda x: str(x["tokens"]["fork"]),
    "wasted": lambda x: str(x["tokens"]["wasted"]),
    "harvested kernels": lambda x: str(x["tokens"]["harvested_candidates"]),
    "prefix reused": lambda x: str(x["tokens"]["prefix_reused"]),
    "prefix computed": lambda x: str(x["tokens"]["prefix_computed"]),
    "GPU-s engine / evaluators": gpu_seconds,
    "engine stood still, s": paused,
    "KV written / read GB": moved_gb,
}
KIND: Columns = {
    "configuration": lambda x: x["configuration"],
    "written in": lambda x: x["kind"],
    "verdicts": lambda x: str(x["verdicts"]),
    "verdict p50 / p95 s": lambda x: f"{plain(x['latency_p50_s'])} / {plain(x['latency_p95_s'])}",
    "of it queued, mean s": lambda x: plain(x["queued_s"]),
    "compiling, mean s": lambda x: plain(x["compile_s"]),
}
SPENT: Columns = {
    "trace": lambda x: label(x),
    "configuration": lambda x: x["configuration"],
    "reasoning until its fork": lambda x: f"{x['spent']['reasoning']:.1f}",
    "its answer": lambda x: f"{x['spent']['answer']:.1f}",
    "queued": lambda x: f"{x['spent']['queued']:.1f}",
    "compile": lambda x: f"{x['spent']['compile']:.1f}",
    "check and time": lambda x: f"{x['spent']['check_and_time']:.1f}",
    "rest": lambda x: f"{x['spent']['rest']:.1f}",
    "seconds": lambda x: f"{sum(x['spent'].values()):.1f}",
    "accepted": lambda x: plain(x["accepted"]),
    "gain": lambda x: plain(x["gain"]),
    "oracle": lambda x: beside(x, "oracle_gain"),
    "sequential's compiling free": lambda x: beside(x, "gain_floor"),
}
RUN: Columns = {
    "configuration": lambda x: x["configuration"],
    "search": lambda x: f"{x['trace']}, {x['iterations']} iterations",
    "seconds": lambda x: f"{x['seconds']:.0f}",
    "time / sequential": lambda x: plain(x["time_over_sequential"]),
    "tokens": lambda x: str(x["tokens"]),
    "tokens / sequential": lambda x: plain(x["tokens_over_sequential"]),
    "best": lambda x: plain(x["best"]),
    "correct": lambda x: str(x["distinct_correct"]),
    "best at 25 / 50 / 75 / 100 % of sequential's time": lambda x: at_shares(x["at_share_of_time"], "best"),
    "over sequential's": lambda x: at_shares(x["at_share_of_time"], "ratio"),
    "best at 25 / 50 / 75 / 100 % of its tokens": lambda x: at_shares(x["at_share_of_tokens"], "best"),
    "over sequential's ": lambda x: at_shares(x["at_share_of_tokens"], "ratio"),
}


def at_shares(shares: Mapping[str, Line], kind: str) -> str:
    return curve({share: one[kind] for share, one in shares.items()})


def table(columns: Columns, lines: Sequence[Line]) -> str:
    rows = [list(columns), ["---"] * len(columns), *([say(line) for say in columns.values()] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def kinds(lines: Sequence[Line]) -> list[Line]:
    """One line a configuration and language of its candidates, over all groups."""
    last = {line["configuration"]: line for line in lines}
    return [
        {"configuration": name, "kind": kind, **found}
        for name, line in last.items()
        for kind, found in line["feedback"].get("by_kind", {}).items()
    ]


def by_trace(lines: Sequence[Line]) -> list[Line]:
    """One line a trace and configuration, traces side by side; those that returned a kernel."""
    last = {line["configuration"]: line for line in lines}
    found = [{"configuration": name, **one} for name, line in last.items() for one in line["by_trace"] if one["spent"]]
    return sorted(found, key=lambda one: (one["group"], one["trace"], one["iteration"], one["seed"]))


def short(commit: str) -> str:
    """Seven digits, and a + where the tree differed from the commit."""
    return commit[:7] + ("+" if "+" in commit else "")


def commits(lines: Sequence[Line]) -> str:
    """Which commit each configuration was played at, and what that means where it is not sequential's."""
    last = {line["configuration"]: line for line in lines if line.get("commits")}
    if not last:
        return ""
    said = [
        f"{name} {', '.join(map(short, line['commits']))} ({', '.join(line['dates'])})" for name, line in last.items()
    ]
    own = last[SEQUENTIAL]["commits"] if SEQUENTIAL in last else []
    other = [name for name, line in last.items() if line["commits"] != own]
    warning = (
        f" Of another commit than sequential's: {', '.join(other)}. Its gain compares two versions; the one with "
        "sequential's compiling free gains nothing by faster compilation."
    )
    return f"Commits: {'; '.join(said)}.{warning if other else ''}"


def markdown(report: Line) -> str:
    """Every figure of the summary; times are against sequential of the same trace and seed."""
    machine = report["machine"]
    gpus = ", ".join(dict.fromkeys(machine["gpu_names"])) or "no GPU"
    parts = [
        f"Replayed through the real engine: `{report['command']}`, {report['model']}, {report['gpus']} "
        f"({machine['gpus']} x {gpus}), {report['searches']} searches at once, {machine['date'][:10]}.",
        commits(report["summary"]),
        f"Gain: sequential's time over the configuration's to {report['target']:g}x eager PyTorch, geometric mean; 1.0 "
        "where it was not met. Sequential's compiling free: the same with its compiling and queueing taken off its "
        "time.\n\n" + table(TIME, report["summary"]),
        "Where the seconds of each search went, up to the answer that it returned.\n\n"
        + table(SPENT, by_trace(report["summary"])),
        table(FEEDBACK, report["summary"]),
        table(KIND, kinds(report["summary"])) if kinds(report["summary"]) else "",
        "Tokens by kind; prefixes of forks that were in the cache are computation avoided.\n\n"
        + table(COST, report["summary"]),
    ]
    if report.get("runs"):
        parts.append(table(RUN, report["runs"]))
    if report.get("left_out"):
        parts.append(
            "Left out for want of time: "
            + ", ".join(f"{x['configuration']} {x['trace']}/iter-{x['iteration']}" for x in report["left_out"])
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def print_table(report: Line) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [(TIME, report["summary"]), (FEEDBACK, report["summary"]), (RUN, report["runs"])]
    for columns, lines in shown:
        if lines:
            found = Table(*columns)
            for line in lines:
                found.add_row(*(say(line) for say in columns.values()))
            Console(width=230).print(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.e2e_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    try:
        report = json.loads(args.report.read_text())
        if not all("gain_floor" in line for line in report["summary"]):  # an earlier version's summary says less
            report["summary"] = summarise(report["rows"], report["phases"], report["evaluators"], report["target"])
        print(markdown(report), end="")
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.e2e_table: {args.report}: {error!r}; give a report of bench.end_to_end", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
