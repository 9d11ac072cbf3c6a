"""Why speed-ups are not within 10 % of the scores': which side's time moved, by how much, and what speaks for a cause.

    python -m bench.evaluation_scores --json bench/results/evaluation_H200.json --markdown

Works on a report of bench.evaluation alone: a candidate's latest verdict, beside the score that its row keeps. The
scores measured each task's reference once an answer, so how far those times lie apart says what a second measurement of
the same reference may differ by. A replay of the candidate as a CUDA graph, in the same verdict, is its time without
the host. Pure functions of rows; no cause is told for what neither of the two explains.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specgen_engine.evaluation.base import Status

WITHIN = 0.1
MODES = ("events", "warm", "graph")
Row = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """A candidate's latest verdict and its score; each ratio is ours / the scores'.

    graph, warm: of the candidate's other times; None where there is none. spread: of the task's reference in the
    scores, largest / smallest. elsewhere: speed-up ratios of this candidate's earlier verdicts.
    """

    name: str
    task: str
    path: str
    speedup: float
    reference: float
    candidate: float
    graph: float | None
    warm: float | None
    reference_warm: float | None
    spread: float
    elsewhere: tuple[float, ...]

    @property
    def misses(self) -> bool:
        return not near(self.speedup)

    @property
    def moved(self) -> str:
        """The side without whose difference the speed-up would be within 10 %; both where neither alone does."""
        alone = [
            name for name, other in (("reference", self.candidate), ("candidate", self.reference)) if near_log(other)
        ]
        return alone[0] if len(alone) == 1 else "both"

    @property
    def explained(self) -> str:
        """By what was recorded; empty when a side that moved is left unexplained."""
        found = []
        if self.moved in ("reference", "both"):
            found.append("scores' own spread" if self.spread >= apart(self.reference) else "")
        if self.moved in ("candidate", "both"):
            found.append(self._why_candidate())
        return "" if "" in found else "; ".join(found)

    def _why_candidate(self) -> str:
        if self.graph is not None and near(self.graph) and self.candidate > self.graph:
            return "host late here"
        if any(near(one) for one in self.elsewhere):
            return "another run here agrees"
        return ""


def near(ratio: float) -> bool:
    return abs(ratio - 1) <= WITHIN


def near_log(ratio: float) -> bool:
    return abs(math.log(ratio)) <= math.log(1 + WITHIN)


def apart(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def compared(rows: Iterable[Row]) -> list[Compared]:
    """Of all candidates with a speed-up both here, in their latest verdict, and in the scores."""
    mine: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["run"]):  # stable: of one run, the order of the report
        if row["status"] != Status.CANCELLED:
            mine.setdefault(row["candidate"], []).append(row)
    both = {name: some for name, some in mine.items() if some[-1]["speedup"] and some[-1]["score"].get("speedup")}
    references: dict[str, list[float]] = {}
    for name, some in both.items():
        references.setdefault(task_of(name), []).append(reference_of(some[-1]["score"]))
    return [one(name, some, references[task_of(name)]) for name, some in sorted(both.items())]


def one(name: str, rows: list[Row], references: list[float]) -> Compared:
    row = rows[-1]
    score, extra = row["score"], row["extra_ms"]

    def ratio(key: str, to: float) -> float | None:
        return extra[key] / to if key in extra else None

    return Compared(
        name=name,
        task=task_of(name),
        path=f"{row['kind']}, {row['pass']}",
        speedup=row["speedup"] / score["speedup"],
        reference=row["reference_ms"] / reference_of(score),
        candidate=row["candidate_ms"] / score["ms"],
        graph=ratio("candidate_graph", score["ms"]),
        warm=ratio("candidate_warm", score["ms"]),
        reference_warm=ratio("reference_warm", reference_of(score)),
        spread=max(references) / min(references),
        elsewhere=tuple(old["speedup"] / score["speedup"] for old in rows[:-1] if old["speedup"]),
    )


def task_of(name: str) -> str:
    return name.split("/iter-")[0]


def reference_of(score: Row) -> float:
    """The reference's ms that a score is relative to."""
    return score["speedup"] * score["ms"]


def modes(some: list[Compared]) -> dict[str, Row]:
    """Which way of timing the candidate agrees best with the scores, of those that have all three.

    steady: of tasks whose reference the scores themselves found within 10 %, so that the speed-up says something too.
    off: |ours / scores - 1| of the candidate's time.
    """
    whole = [one for one in some if one.graph and one.warm]
    steady = [one for one in whole if one.spread <= 1 + WITHIN]
    return {
        name: {mode: agreement(part, mode) for mode in MODES} for name, part in (("all", whole), ("steady", steady))
    }


def agreement(some: list[Compared], mode: str) -> Row:
    times = [(one, {"events": one.candidate, "warm": one.warm or 0.0, "graph": one.graph or 0.0}[mode]) for one in some]
    off = sorted(abs(time - 1) for _, time in times)
    return {
        "n": len(times),
        "time_within": sum(near(time) for _, time in times),
        "speedup_within": sum(near(one.reference / time) for one, time in times),
        "off_p50": round(off[len(off) // 2], 4) if off else None,
        "off_p90": round(off[int(0.9 * len(off))], 4) if off else None,
    }


def groups(some: list[Compared]) -> list[Row]:
    """By task and path: how many miss, which side moved, and how much of it is explained."""
    parts: dict[tuple[str, str], list[Compared]] = {}
    for one in some:
        parts.setdefault((one.task, one.path), []).append(one)
    return [
        {
            "task": task,
            "path": path,
            "n": len(part),
            "misses": sum(one.misses for one in part),
            "moved": dict(Counter(one.moved for one in part if one.misses)),
            "reference": [min(one.reference for one in part), max(one.reference for one in part)],
            "spread": part[0].spread,
            "candidate": [min(one.candidate for one in part), max(one.candidate for one in part)],
            "explained": sum(bool(one.explained) for one in part if one.misses),
        }
        for (task, path), part in sorted(parts.items())
    ]


def markdown(some: list[Compared]) -> str:
    missing = [one for one in some if one.misses]
    lines = [
        "| task, path | n | miss | moved | reference ours/scores | spread there | candidate ours/scores | explained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in groups(some):
        moved = ", ".join(f"{side} {count}" for side, count in sorted(group["moved"].items())) or "-"
        spans = ["{:.2f}-{:.2f}".format(*group[side]) for side in ("reference", "candidate")]
        name = f"{group['task']}, {group['path']}"
        lines.append(
            f"| {name} | {group['n']} | {group['misses']} | {moved} | {spans[0]} | {group['spread']:.2f} | {spans[1]} "
            f"| {group['explained']} of {group['misses']} |"
        )
    lines += ["", "| speed-up that misses | ours/scores | reference | candidate | as a graph | moved | explained by |"]
    lines.append("|---|---|---|---|---|---|---|")
    for one in missing:
        graph = f"{one.graph:.2f}" if one.graph else "none"
        lines.append(
            f"| {one.name.replace('/iter-1', '').replace('.md', '')} | {one.speedup:.2f} | {one.reference:.2f} "
            f"| {one.candidate:.2f} | {graph} | {one.moved} | {one.explained or '**nothing**'} |"
        )
    return "\n".join(lines)


def summary(some: list[Compared]) -> Row:
    missing = [one for one in some if one.misses]
    return {
        "n": len(some),
        "misses": len(missing),
        "moved": dict(Counter(one.moved for one in missing)),
        "explained_by": dict(Counter(one.explained or "nothing" for one in missing)),
        "unexplained": [one.name for one in missing if not one.explained],
        "within_10_percent_by_mode": modes(some),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation_scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="a report of bench.evaluation")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/evaluation.md")
    args = parser.parse_args()
    some = compared(json.loads(args.json.read_text())["verdicts"])
    if args.markdown:
        print(markdown(some))
    print(json.dumps(summary(some), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
