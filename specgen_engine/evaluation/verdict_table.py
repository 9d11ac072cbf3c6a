"""Verdicts of `specgen evaluate` as a table for people and as rows of its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from .base import Status, Verdict


class Judged(NamedTuple):
    """A verdict with what it is about. workload: "" where the task has one only."""

    path: Path
    workload: str
    verdict: Verdict


def table_of(title: str, judged: Sequence[Judged]) -> Table:
    """One row a verdict, and one for all workloads of a candidate where there are several."""
    table = Table(title=title)
    profiled = any(one.verdict.profile for one in judged)
    several = any(one.workload for one in judged)
    names = [
        "candidate",
        "workload",
        "form",
        "status",
        "speed-up",
        "95 %",
        "ms",
        "reference ms",
        "roofline",
        "bound",
        "reason",
    ]
    left_out = {name for name, shown in (("workload", several), ("bound", profiled)) if not shown}
    for name in names:
        if name not in left_out:
            table.add_column(name, overflow="fold")
    short = _short_names([one.path for one in judged])
    for one in judged:
        cells = dict(zip(names, _cells(one), strict=True)) | {"candidate": short[one.path]}
        table.add_row(*(cells[name] for name in names if name not in left_out))
    if several:
        for path, speedup in geometric_means(judged).items():
            cells = dict.fromkeys(names, "") | {
                "candidate": short[path],
                "workload": "all: geometric mean",
                "speed-up": f"{speedup:.2f}x" if speedup else "none: not correct on all",
            }
            table.add_row(*(cells[name] for name in names if name not in left_out))
    return table


def _cells(one: Judged) -> list[str]:
    verdict = one.verdict
    figures = ["", "", "", "", ""]
    if verdict.speedup is not None and verdict.interval is not None:
        low, high = verdict.interval
        figures = [f"{verdict.speedup:.2f}x", f"{low:.2f}-{high:.2f}"]
        figures += [f"{verdict.candidate_ms:.3f}", f"{verdict.reference_ms:.3f}"]
        figures += [f"{verdict.roofline:.0%}" if verdict.roofline is not None else ""]
    bound = f"{verdict.profile['bound']} ({verdict.profile['tool']})" if verdict.profile else ""
    reason = verdict.reason or str(verdict.conditions.get("warning", ""))
    return [str(one.path), one.workload, verdict.form, str(verdict.status), *figures, bound, reason]


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """File names, where no two differ only in their folder."""
    different = set(paths)
    unique = len({path.name for path in different}) == len(different)
    return {path: path.name if unique else str(path) for path in different}


def geometric_means(judged: Sequence[Judged]) -> dict[Path, float | None]:
    """Speed-up of each candidate over all workloads; None where it is not correct on every one."""
    speedups: dict[Path, list[float | None]] = {}
    for one in judged:
        correct = one.verdict.status is Status.CORRECT
        speedups.setdefault(one.path, []).append(one.verdict.speedup if correct else None)
    means: dict[Path, float | None] = {}
    for path, values in speedups.items():
        known = [value for value in values if value]
        whole = len(known) == len(values)
        means[path] = math.exp(sum(map(math.log, known)) / len(known)) if whole else None
    return means


def row_of(one: Judged) -> dict[str, Any]:
    """A verdict in a report (specgen.verdicts/1). Figures that are no numbers are told as text."""
    verdict = one.verdict
    return {
        "candidate": str(one.path),
        "workload": one.workload,
        "form": verdict.form,
        "status": str(verdict.status),
        "speedup": verdict.speedup,
        "interval": verdict.interval,
        "candidate_ms": verdict.candidate_ms,
        "reference_ms": verdict.reference_ms,
        "reason": verdict.reason,
        "digest": verdict.digest,
        "kind": verdict.kind,
        "max_abs_error": _finite(verdict.max_abs_error),
        "max_rel_error": _finite(verdict.max_rel_error),
        "sandbox": verdict.sandbox,
        "own_s": verdict.own_s,
        "stages": {str(stage): seconds for stage, seconds in verdict.stages.items()},
        "overhead": verdict.overhead,
        "extra_ms": verdict.extra_ms,
        "conditions": verdict.conditions,
        "roofline": verdict.roofline,
        "profile": verdict.profile,
    }


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
