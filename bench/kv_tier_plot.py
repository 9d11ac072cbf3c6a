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

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
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
    left.legend(fontsize=7)
    loaded = [row for row in report["rows"] if row["load"] != "alone"]
    names = [f"{row['level']}\\n{row['load']}\\n({row['server']})" for row in loaded]
    right.bar(range(len(loaded)), [row["ttft_ms"] for row in loaded], color=[COLOURS[row["level"]] for row in loaded])
    right.set_xticks(range(len(loaded)), names, fontsize=6)
    right.set_ylabel("median time to first token, ms")
    machine = report["machine"]
    figure.suptitle(
        f"{machine['gpus']} x {machine['gpu']}, {report['attention_backend']}, {report['commit']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(target, dpi=120)
