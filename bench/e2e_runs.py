"""A search of several iterations, one after the other: the best kernel so far by time and by tokens. Pure.

Between iterations the recorded agent's own feedback applies: a recording can't react to what a configuration kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.e2e_configurations import SEQUENTIAL
from bench.e2e_report import SHARES, correct, tokens, tokens_at_verdicts_of

Row = Mapping[str, Any]


def run_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Whole time and tokens of the iterations, ascending; curve: [seconds, tokens, speed-up] at each better kernel."""
    seconds, spent, best = 0.0, 0, 0.0
    curve: list[list[float]] = []
    for row in sorted(rows, key=lambda one: one["iteration"]):
        at = tokens_at_verdicts_of(row)
        for one in correct(row):
            if one["speedup"] > best:
                best = one["speedup"]
                curve.append([round(seconds + one["verdict_s"], 3), spent + at[one["hash"]], best])
        seconds, spent = seconds + row["client_s"], spent + tokens(row)
    return {
        "iterations": len(rows),
        "seconds": round(seconds, 3),
        "tokens": spent,
        "best": best,
        "distinct_correct": len({one["hash"] for row in rows for one in correct(row)}),
        "curve": curve,
    }


def best_at(run: Mapping[str, Any], limit: float, column: int) -> float | None:
    """Best speed-up within a limit of seconds (column 0) or tokens (column 1)."""
    return max((point[2] for point in run["curve"] if point[column] <= limit), default=None)


def runs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line a configuration, trace and seed that has every iteration of a sequential search of two or more."""
    whole: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        whole.setdefault((row["configuration"], row["trace"], row["seed"]), []).append(row)
    lines = []
    for (name, trace, seed), mine in whole.items():
        alone = whole.get((SEQUENTIAL, trace, seed), [])
        if len(alone) > 1 and {row["iteration"] for row in alone} <= {row["iteration"] for row in mine}:
            lines.append({"configuration": name, "trace": trace, "seed": seed, **beside(run_of(mine), run_of(alone))})
    return lines


def beside(run: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
    """The run's figures and, at shares of sequential's time and tokens, both best kernels and their ratio."""
    shares = {
        kind: {f"{share:.0%}": _at(run, alone, share * alone[kind], column) for share in SHARES}
        for column, kind in enumerate(("seconds", "tokens"))
    }
    return {
        **run,
        "time_over_sequential": run["seconds"] / alone["seconds"],
        "tokens_over_sequential": run["tokens"] / alone["tokens"],
        "best_over_sequential": run["best"] / alone["best"] if alone["best"] else None,
        "at_share_of_time": shares["seconds"],
        "at_share_of_tokens": shares["tokens"],
    }


def _at(run: Mapping[str, Any], alone: Mapping[str, Any], limit: float, column: int) -> dict[str, float | None]:
    """ratio: None while sequential has no kernel at all."""
    mine, its = best_at(run, limit, column), best_at(alone, limit, column)
    return {"best": mine, "sequential": its, "ratio": (mine or 0.0) / its if its else None}
