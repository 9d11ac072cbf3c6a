"""Figures of judged answers: against scores, seconds by kind, two runs of the same kernels. Pure functions of rows."""

from __future__ import annotations

import statistics
from typing import Any

from specgen_engine.evaluation.base import Status
from specgen_engine.evaluation.timing import BEHIND

KINDS = ("triton", "torch", "cuda")
AT_HAND_S = 0.03
"""Seconds of the step "reference" below which a judge had the task already."""
Rows = list[dict[str, Any]]


def summary(rows: Rows, scores: dict[str, Any]) -> dict[str, Any]:
    """Everything that follows from rows; a candidate's last row counts, the passes of the last run with two compare."""
    rated = [row for row in rows if row["status"] != Status.CANCELLED]
    latest = list({row["candidate"]: row for row in rated}.values())
    newest = max((row["run"] for row in rows), default=0)
    mine = [row for row in rated if row["run"] == newest]
    passes = {name: [row for row in mine if row["pass"] == name] for name in dict.fromkeys(row["pass"] for row in mine)}
    twice = max((row["run"] for row in rated if row["pass"] == "twice-2"), default=None)
    if twice is not None:
        first, second = ([row for row in rated if (row["run"], row["pass"]) == (twice, f"twice-{n}")] for n in (1, 2))
    else:  # as reports were before they had two runs on purpose
        first = [row for name, part in passes.items() if not name.startswith("rate") for row in part]
        second = [row for name, part in passes.items() if name.startswith("rate") for row in part]
    return {
        "comparison": compare(latest, scores),
        "latency": {name: latency(part) for name, part in passes.items()} | {"newest run": latency(mine)},
        "two_runs": repeats(first, second) | {"of_run": second[0]["run"]} if first and second else None,
    }


def compare(rows: Rows, scores: dict[str, Any]) -> dict[str, Any]:
    """Statuses that differ from the scores, one by one; ours / theirs over speed-ups and times, and by task."""
    known = [(row, scores[row["candidate"]]) for row in rows if row["candidate"] in scores]
    for row, score in known:
        row["score"] = {"status": score["status"], "speedup": score.get("speedup"), "ms": score.get("ms")}
        if row["speedup"] and score.get("speedup"):
            row["ratio"] = round(row["speedup"] / score["speedup"], 3)
    both = [(row, score) for row, score in known if "ratio" in row]
    ratios = {
        "speedup": [row["ratio"] for row, _ in both],
        "candidate_ms": [row["candidate_ms"] / score["ms"] for row, score in both],
        "reference_ms": [row["reference_ms"] / score["ref_ms"] for row, score in both],
    }
    return {
        "scored": len(scores),
        "ran": len(known),
        "not_run": sorted(set(scores) - {row["candidate"] for row in rows}),
        "equal_status": sum(row["status"] == score["status"] for row, score in known),
        "differences": [
            {"candidate": row["candidate"], "ours": row["status"], "scores": score["status"], "reason": row["reason"]}
            for row, score in known
            if row["status"] != score["status"]
        ],
        "ratio_to_scores": {
            name: (spread(values) or {}) | {"within_10_percent": sum(abs(value - 1) <= 0.1 for value in values)}
            for name, values in ratios.items()
        },
        "by_task": by_task(both),
    }


def by_task(both: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """How far apart the same reference's times lie within the scores and here, and speed-ups within 10 %."""
    tasks: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row, score in both:
        tasks.setdefault(row["candidate"].split("/iter-")[0], []).append((row, score))
    found = {}
    for name, pairs in sorted(tasks.items()):
        theirs, ours = ([score["ref_ms"] for _, score in pairs], [row["reference_ms"] for row, _ in pairs])
        found[name] = {
            "n": len(pairs),
            "speedups_within_10_percent": sum(abs(row["ratio"] - 1) <= 0.1 for row, _ in pairs),
            "reference_ms_scores": [round(min(theirs), 4), round(max(theirs), 4)],
            "reference_ms_here": [round(min(ours), 4), round(max(ours), 4)],
        }
    return found


def latency(rows: Rows) -> dict[str, Any]:
    """Seconds from text to verdict by kind, the same without compiling, and the harness's own share."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        correct = [row for row in mine if row["status"] == Status.CORRECT]
        at_hand = [row for row in correct if row["overhead"].get("reference", 0.0) < AT_HAND_S]
        other = [row for row in correct if row not in at_hand]
        if mine:
            without = [row["verdict_s"] - row["stages"].get("compile", 0.0) for row in mine]
            figures[kind] = {
                "verdict_s": percentiles([row["verdict_s"] for row in mine]),
                "verdict_s_without_compile_stage": percentiles(without),
                "overhead_s": percentiles([steps(row) for row in correct]),
                "overhead_s_reference_at_hand": percentiles([steps(row) for row in at_hand]),
                "overhead_s_another_task_before": percentiles([steps(row) for row in other]),
                "overhead_s_in_making_contexts": percentiles([in_contexts(row) for row in correct]),
                "overhead_s_by_step": by_step(correct),
                "overhead_s_by_step_reference_at_hand": by_step(at_hand),
            }
    return figures


def steps(row: dict[str, Any]) -> float:
    """The harness's own seconds: what an evaluation took beyond its candidate's compiling, calls and timed blocks."""
    return sum(row["overhead"].values())


def in_contexts(row: dict[str, Any]) -> float:
    """Of these, on a GPU: making the candidate's context, or waiting for those of the spares."""
    return row["overhead"].get("open", 0.0) + row["overhead"].get("spare", 0.0)


def percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    at = {f"p{share}": ordered[min(len(ordered) - 1, int(share * len(ordered) / 100))] for share in (50, 95)}
    return {"n": len(ordered)} | {key: round(value, 3) for key, value in at.items()}


def spread(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    figures = {"min": min(values), "p5": cuts[0], "p50": statistics.median(values), "p95": cuts[-1], "max": max(values)}
    return {"n": len(values)} | {key: round(value, 4) for key, value in figures.items()}


def by_step(rows: Rows, of: str = "overhead") -> dict[str, Any]:
    """The harness's own time by step (of: or by "stages"), the largest median first."""
    names = {name for row in rows for name in row[of]}
    found = {name: percentiles([row[of].get(name, 0.0) for row in rows]) for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]["p50"] if item[1] else 0.0))


def repeats(first: Rows, second: Rows) -> dict[str, Any]:
    """How far two runs of the same answers agree: share whose intervals overlap, and |a - b| / mean."""
    before = {row["candidate"]: row for row in first if row["speedup"]}
    pairs = [(before[row["candidate"]], row) for row in second if row["speedup"] and row["candidate"] in before]
    kernels = {a["candidate"]: _pair(a, b) for a, b in pairs}
    waits = {a["candidate"] for a, b in pairs if waits_for_the_host(a) or waits_for_the_host(b)}
    split = {
        "gpu_decides": [one for name, one in kernels.items() if name not in waits],
        "host_decides": [kernels[name] for name in kernels if name in waits],
    }
    found = _agreement(list(kernels.values())) | {name: _agreement(some) for name, some in split.items() if some}
    return found | {"kernels": kernels}


def waits_for_the_host(row: dict[str, Any]) -> bool:
    """Did the GPU wait for the host in most calls of a side, so that the host's speed is in the figure?"""
    return max((row.get("conditions") or {}).get("host_behind", {"": 0.0}).values()) > BEHIND


def _agreement(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    widths = [(high - low) / 2 / known for one in pairs for known, (low, high) in _figures(one)]
    return {
        "pairs": len(pairs),
        "intervals_overlap": sum(one["overlap"] for one in pairs),
        "relative_difference": spread([one["apart"] for one in pairs]),
        "cv": spread([one["cv"] for one in pairs]),
        "cv_of_candidate_ms": spread([one["cv_candidate_ms"] for one in pairs]),
        "half_width": spread(widths),
    }


def _figures(pair: dict[str, Any]) -> list[tuple[float, list[float]]]:
    return list(zip(pair["speedups"], pair["intervals"], strict=True))


def _pair(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {
        "speedups": [a["speedup"], b["speedup"]],
        "intervals": [a["interval"], b["interval"]],
        "overlap": a["interval"][0] <= b["interval"][1] and b["interval"][0] <= a["interval"][1],
        "apart": round(abs(a["speedup"] - b["speedup"]) / ((a["speedup"] + b["speedup"]) / 2), 4),
        "cv": round(variation(a["speedup"], b["speedup"]), 4),
        "cv_candidate_ms": round(variation(a["candidate_ms"], b["candidate_ms"]), 4),
        "cv_reference_ms": round(variation(a["reference_ms"], b["reference_ms"]), 4),
    }


def variation(a: float, b: float) -> float:
    """Coefficient of variation of two figures: sample standard deviation over mean."""
    return statistics.stdev((a, b)) / statistics.mean((a, b))


def per_minute(count: int, seconds: float, statuses: list[str]) -> dict[str, Any]:
    return {
        "verdicts_per_minute": round(60 * count / seconds, 1) if seconds else None,
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
    }
