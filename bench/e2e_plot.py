"""Figures of bench.end_to_end: a timeline per search, time to quality, and what each configuration gained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.e2e_configurations import SEQUENTIAL
from bench.e2e_evaluators import over_time
from bench.e2e_report import SHARES, label

USE_STEP_S = 2.0
COLOURS = {"correct": "tab:green", "wrong": "tab:red"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Top: timelines of sequential and specgen, and evaluators over time; below: best-so-far and gain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, lines = report["rows"], report["summary"]
    shown = [row for row in rows if row["configuration"] in (SEQUENTIAL, "specgen") and row["seed"] == report["seed"]]
    shown.sort(
        key=lambda row: (row["group"], row["trace"], row["iteration"], row["configuration"] != SEQUENTIAL), reverse=True
    )
    height = 2.5 + 0.28 * len(shown)
    figure, axes = pyplot.subplot_mosaic(
        [["timeline", "timeline"], ["use", "use"], ["curve", "gain"]],
        figsize=(13, height + 6.8),
        height_ratios=[height, 2.6, 4.2],
    )
    _timelines(axes["timeline"], shown)
    _use(axes["use"], shown, report["evaluators"])
    _curves(axes["curve"], lines)
    _bars(axes["gain"], lines)
    figure.tight_layout()
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=110)
    pyplot.close(figure)
    os.replace(part, path)


def _timelines(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for height, row in enumerate(rows):
        reasoning = row["reasoning_s"] or row["wall_s"]
        axes.barh(height, reasoning, color="tab:blue", alpha=0.35, height=0.8)
        axes.barh(height, row["client_s"] - reasoning, left=reasoning, color="tab:grey", alpha=0.5, height=0.8)
        for fork in row["forks"]:
            if fork["finished_s"] is not None:
                axes.plot(
                    [fork["started_s"], fork["finished_s"]], [height - 0.25] * 2, color="tab:orange", linewidth=1.5
                )
        for one in row["candidates"]:
            if one["verdict_s"] is not None:
                colour = COLOURS.get(one["status"], "tab:brown")
                axes.plot([one["submitted_s"], one["verdict_s"]], [height + 0.05] * 2, color=colour, linewidth=1)
                axes.plot(one["verdict_s"], height + 0.05, marker=".", color=colour)
        axes.plot(row["client_s"], height, marker="|", color="black", markersize=11)
    axes.set_yticks(range(len(rows)), [f"{label(row)}, {row['configuration']}" for row in rows], fontsize=8)
    axes.set(xlabel="seconds (blue: reasoning, grey: answer and verdict, orange: forks, green and red: evaluations)")


def _use(axes: Any, rows: Sequence[Mapping[str, Any]], evaluators: int) -> None:
    for name, colour in ((SEQUENTIAL, "tab:blue"), ("specgen", "tab:orange")):
        mine = [row for row in rows if row["configuration"] == name]
        for share, style in zip(over_time(mine, evaluators, USE_STEP_S), ("--", "-"), strict=True):
            axes.step([n * USE_STEP_S for n in range(len(share))], share, style, where="post", color=colour)
            axes.lines[-1].set_label(f"{name}, {'GPU work' if style == '-' else 'with compiling'}")
    axes.set(xlabel="seconds", ylabel="evaluators in use", ylim=(0, 1.05))
    axes.legend(fontsize=7)


def _curves(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for line in lines:
        if line["group"] == lines[-1]["group"]:
            axes.plot(
                SHARES,
                [line["best_by_time"][f"{share:.0%}"] for share in SHARES],
                marker="o",
                label=line["configuration"],
            )
    axes.set(xlabel="share of sequential's time", ylabel="best speed-up / final answer's", ylim=(0, None))
    axes.legend(fontsize=7)


def _bars(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    shown = [line for line in lines if line["group"] == lines[-1]["group"]]
    axes.barh([line["configuration"] for line in shown], [line["gain"] for line in shown], color="tab:blue", alpha=0.6)
    for height, line in enumerate(shown):
        if line.get("oracle_gain"):
            axes.plot(line["oracle_gain"], height, marker="|", color="black", markersize=14)
        if line.get("evaluators") and line["evaluators"]["busy"] is not None:
            axes.text(0.02, height, f"evaluators busy {line['evaluators']['busy']:.0%}", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(xlabel="gain over sequential (mark: oracle)")
