"""Figures of bench.end_to_end: where each search's time went, evaluators over time, time to quality, gains."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.e2e_configurations import SEQUENTIAL
from bench.e2e_evaluators import over_time
from bench.e2e_report import accepted, best_at_seconds, key_of, label
from bench.e2e_spent import where_time_went

USE_STEP_S = 2.0
CURVE_STEPS = 200
DOTS = {"correct": "tab:green", "wrong": "tab:red"}
PARTS = {
    "reasoning": ("#b7d3ea", "reasoning"),
    "answer": ("#4f8fc4", "answer"),
    "queued": ("#d9d9d9", "waits for an evaluator"),
    "compile": ("#f2a65a", "compiles"),
    "check_and_time": ("#5aa469", "checked and timed"),
    "rest": ("#7f7f7f", "rest"),
}
Row = Mapping[str, Any]


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Top: the time of each search of sequential and specgen; evaluators over time; best so far; gains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, lines = report["rows"], report["summary"]
    shown = [row for row in rows if row["configuration"] in (SEQUENTIAL, "specgen") and row["seed"] == report["seed"]]
    height = 1.6 + 0.3 * len(shown)
    figure, axes = pyplot.subplot_mosaic(
        [["time"] * 6, ["alone"] * 3 + ["forked"] * 3, ["curve"] * 2 + ["traces"] * 2 + ["gain"] * 2],
        figsize=(15, height + 7.6),
        height_ratios=[height, 2.2, 4.6],
    )
    _searches(axes["time"], shown)
    longest = max((row["began_s"] + row["client_s"] for row in shown), default=1.0)
    for name, where in ((SEQUENTIAL, "alone"), ("specgen", "forked")):
        _use(axes[where], [row for row in shown if row["configuration"] == name], report["evaluators"], name)
        axes[where].set_xlim(0, longest)
    _curves(axes["curve"], shown)
    _gains(axes["traces"], [one for line in _last(lines, "specgen") for one in line["by_trace"]], label)
    _gains(
        axes["gain"],
        [line for line in lines if line["configuration"] != SEQUENTIAL],
        lambda line: f"{line['configuration']}, {line['group']}",
    )
    axes["traces"].set_title("by trace, specgen", fontsize=9)
    axes["gain"].set_title("geometric means", fontsize=9)
    figure.tight_layout()
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=100)
    pyplot.close(figure)
    os.replace(part, path)


def _last(lines: Sequence[Row], configuration: str) -> list[Row]:
    """The line over all groups, if there is one."""
    return [line for line in lines if line["configuration"] == configuration][-1:]


def _searches(axes: Any, rows: Sequence[Row]) -> None:
    """A bar a search, by what its seconds went into; dots: verdicts; thin lines: forks."""
    ordered = sorted(
        rows, key=lambda row: (row["group"], row["trace"], row["iteration"], row["configuration"] != SEQUENTIAL)
    )
    for height, row in enumerate(ordered):
        left = 0.0
        for part, seconds in (where_time_went(row) or {"rest": row["client_s"]}).items():
            axes.barh(height, seconds, left=left, color=PARTS[part][0], height=0.8)
            left += seconds
        for fork in row["forks"]:
            end = row["client_s"] if fork["finished_s"] is None else fork["finished_s"]
            axes.plot([fork["started_s"], end], [height + 0.27] * 2, color="#8c4a00", linewidth=1.2)
        for one in row["candidates"]:
            if one["verdict_s"] is not None:
                axes.plot(one["verdict_s"], height, marker=".", color=DOTS.get(one["status"], "tab:brown"))
        speed = accepted(row)
        axes.text(left, height, f"  {speed:.2f}x" if speed else "  no kernel", va="center", fontsize=8)
    axes.set_yticks(range(len(ordered)), [f"{label(row)}, {row['configuration']}" for row in ordered], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.06, y=0.01)
    for colour, said in PARTS.values():
        axes.barh([0], [0], color=colour, label=said)
    axes.plot([], [], color="#8c4a00", linewidth=1.2, label="forks")
    for status, colour in DOTS.items():
        axes.plot([], [], ".", color=colour, label=f"verdict: {status}")
    axes.legend(fontsize=8, loc="center right")
    axes.set(xlabel="seconds since the request; at a bar's end: speed-up of the kernel that was returned")


def _use(axes: Any, rows: Sequence[Row], evaluators: int, name: str) -> None:
    held, busy = over_time(rows, evaluators, USE_STEP_S)
    for share, colour, said in ((held, "#f2a65a", "with compiling"), (busy, "#5aa469", "GPU work")):
        at = [n * USE_STEP_S for n in range(len(share) + 1)]
        axes.fill_between(at, [*share, 0.0], step="post", color=colour, label=said, linewidth=0)
    axes.set(xlabel=f"seconds, {name}", ylabel="evaluators in use", ylim=(0, 1.05))
    axes.legend(fontsize=8, loc="upper right")


def _curves(axes: Any, rows: Sequence[Row]) -> None:
    """Best so far over the final answer's speed-up, mean over a group's traces, at each share of sequential's time."""
    alone = {key_of(row): row for row in rows if row["configuration"] == SEQUENTIAL}
    shares = [step / CURVE_STEPS for step in range(CURVE_STEPS + 1)]
    for name, colour in ((SEQUENTIAL, "tab:blue"), ("specgen", "tab:orange")):
        mine = [row for row in rows if row["configuration"] == name and accepted(alone.get(key_of(row), _NONE))]
        for group, style in zip(dict.fromkeys(row["group"] for row in mine), ("-", "--", ":", "-."), strict=False):
            part = [(row, alone[key_of(row)]) for row in mine if row["group"] == group]
            curve = [
                statistics.fmean(
                    (best_at_seconds(row, share * its["client_s"]) or 0.0) / (accepted(its) or 1.0) for row, its in part
                )
                for share in shares
            ]
            axes.step(shares, curve, style, where="post", color=colour, label=f"{name}, {group}")
    axes.set(xlabel="share of sequential's time", ylabel="best speed-up so far / final answer's", ylim=(0, None))
    axes.legend(fontsize=8)


_NONE: Row = {"accepted": None}


def _gains(axes: Any, lines: Sequence[Row], named: Any) -> None:
    gains = [line["gain"] for line in lines]
    axes.barh([f"{named(line)}: {line['gain']:.2f}x" for line in lines], gains, color="tab:orange", alpha=0.6)
    for height, line in enumerate(lines):
        if line.get("oracle_gain"):
            axes.plot(line["oracle_gain"], height, marker="|", color="black", markersize=15, markeredgewidth=2)
        axes.plot(line["gain_floor"], height, marker="D", color="tab:blue", markersize=5)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="gain over sequential\n(| oracle, diamond: sequential's compiling free)")
