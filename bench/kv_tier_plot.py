"""The curves of a bench.kv_tier report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

COLOURS = {
    "recompute": "tab:gray",
    "host": "tab:orange",
    "peer": "tab:blue",
    "loopback": "tab:blue",
    "own": "tab:green",
}


def plot(report: dict[str, Any], target: Path) -> None:
    """Time to first token by prefix (alone), and bars for the loads; says so when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"matplotlib isn't installed: {target} was not drawn", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loaded = [row for row in report["rows"] if row["load"] != "alone" and row["ttft_ms"] is not None]
    figure, panels = plt.subplots(1, 2 if loaded else 1, figsize=(12 if loaded else 7, 4.5), squeeze=False)
    left = panels[0][0]
    alone = [row for row in report["rows"] if row["load"] == "alone"]
    for level, colour in COLOURS.items():
        for server, style in (("host", "--"), ("peer", "-"), ("loopback", "-")):
            rows = [row for row in alone if row["level"] == level and row["server"] == server]
            if rows:
                points = sorted((row["prefix_tokens"], row["ttft_ms"]) for row in rows)
                left.plot(
                    *zip(*points, strict=True), style, color=colour, marker="o", label=f"{level} ({server} server)"
                )
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("prefix, tokens")
    left.set_ylabel("time to first token, ms")
    if alone:
        left.legend(fontsize=7)
    if loaded:
        draw_loads(panels[0][1], loaded)
    machine = report["machine"]
    figure.suptitle(
        f"{machine['gpus']} x {machine['gpu']}, {report['attention_backend']}, {report['commit']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def draw_loads(panel: Any, rows: list[dict[str, Any]]) -> None:
    names = [f"{row['level']}\n{row['load']}\n({row['server']})" for row in rows]
    panel.bar(range(len(rows)), [row["ttft_ms"] for row in rows], color=[COLOURS[row["level"]] for row in rows])
    panel.set_xticks(range(len(rows)), names, fontsize=6)
    panel.set_ylabel("median time to first token, ms")
