"""Curves of bench.kv_transfer reports: GB/s by chunk size, by SMs and by batch, each way, against the ceiling; and what
a call takes by the host's clock, with the peer libraries beside it."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 1 << 20
METHODS = (
    "copy-engine",
    "ours-auto",
    "ours-static",
    "ours-tiled",
    "ours-tuned",
    "ours-vector",
    "ours-staged",
    "ours-staged-runs/128M",
    "copy-batch",
    "torch-index",
    "sgl-kvcacheio/q16",
    "host-pinned",
)
CALLS = ("call-direct", "call-staged", "call-engine", "call-copy-batch", "nixl", "mooncake")
BIG = (192 * MIB, 320 * MIB)


def _curve(rows: list[dict[str, Any]], x: str, **wanted: Any) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["gbps"] and row["method"] in METHODS and all(row[key] == value for key, value in wanted.items()):
            curves[row["method"]].append((row[x], row["gbps"]))
    return {method: sorted(points) for method, points in curves.items()}


def _calls(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["us"] and row["method"] in CALLS:
            curves[row["method"]].append((row["bytes"], row["us"]))
    return {method: sorted(dict(points).items()) for method, points in curves.items()}


def _panels(rows: list[dict[str, Any]], direction: str) -> list[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    everything = [row for row in rows if row["shape"] == "sweep" and row["direction"] == direction]
    sweep = [row for row in everything if row.get("clock") != "host"]
    big = [row for row in sweep if BIG[0] < row["bytes"] < BIG[1]]
    at_16 = [row for row in sweep if row["sm_budget"] == 16]
    two_kib = [row for row in at_16 if row["chunk_bytes"] == 2048]
    return [
        (
            f"{direction}, 256 MiB, 16 SMs",
            "chunk_bytes",
            _curve([r for r in big if r["sm_budget"] == 16], "chunk_bytes"),
        ),
        (
            f"{direction}, 256 MiB, chunks of 2 KiB",
            "sms",
            _curve([r for r in big if r["sms"]], "sms", chunk_bytes=2048),
        ),
        (f"{direction}, chunks of 2 KiB, 16 SMs", "bytes", _curve(two_kib, "bytes")),
        (
            f"{direction}, chunks of 2 KiB, call to arrival",
            "bytes",
            _calls([r for r in everything if r["chunk_bytes"] == 2048]),
        ),
    ]


def plot_report(sources: list[Path], target: Path) -> int:
    """Draw the rows of one machine's reports into `target`; returns an exit status, 2 where one is missing."""
    try:
        import matplotlib
    except ImportError:
        listed = " ".join(map(str, sources))
        print(f"matplotlib isn't installed: draw later with `--plot-from {listed} --plot {target}`", file=sys.stderr)
        return 2
    if missing := [source for source in sources if not source.is_file()]:
        print(f"error: --plot-from {missing[0]}: no such report", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    from matplotlib import pyplot

    reports = [json.loads(source.read_text()) for source in sources]
    rows = [row for report in reports for row in report["rows"]]
    figure, grid = pyplot.subplots(2, 4, figsize=(22, 9), constrained_layout=True)
    for line, direction in zip(grid, ("push", "pull"), strict=True):
        for axes, (title, label, curves) in zip(line, _panels(rows, direction), strict=True):
            for method, points in curves.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
            by_host = "call" in title
            axes.set(title=title, xlabel=label, ylabel="us" if by_host else "GB/s", xscale="log")
            if by_host and curves:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            if curves:
                axes.legend(fontsize=7)
    machine = reports[0]["machine"]
    figure.suptitle(
        f"{machine['gpus']} x {machine['gpu'] or machine['cpu']}, driver {machine['driver']}, {machine['date']}"
    )
    partial = target.with_name(f".{target.name}.partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(target)
    return 0
