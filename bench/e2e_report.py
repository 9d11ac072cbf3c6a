"""What the rows of bench.end_to_end say: gains, curves, feedback, tokens, utilisation. Pure: rows in, figures out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.e2e_configurations import SEQUENTIAL
from bench.e2e_evaluators import shares
from bench.e2e_spent import where_time_went, without_compiling

SHARES = (0.25, 0.5, 0.75, 1.0)
_NOTHING_USED: dict[str, Any] = {"busy": None, "useful": None, "gpu_seconds": {}}
Row = Mapping[str, Any]


def mean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the positive values; None without any."""
    kept = [value for value in values if value]
    return statistics.geometric_mean(kept) if kept else None


def label(row: Row) -> str:
    """What a row played, as in the tables."""
    return row["trace"] if row["iteration"] == 1 else f"{row['trace']}/iter-{row['iteration']}"


def correct(row: Row) -> list[Row]:
    """Its distinct correct candidates, by the time of their verdicts."""
    found = [one for one in row["candidates"] if one["status"] == "correct" and one["verdict_s"] is not None]
    return sorted(found, key=lambda one: one["verdict_s"])


def best_at_seconds(row: Row, seconds: float) -> float | None:
    """Best speed-up known at a time; once the search has answered, what it accepted stays."""
    return max((one["speedup"] for one in correct(row) if one["verdict_s"] <= seconds), default=None)


def tokens_at_verdicts_of(row: Row) -> dict[str, int]:
    """By correct candidate: base and fork tokens that had been spent when its verdict was in.

    A verdict that no decision followed, such as sequential's only one, came when all tokens had been spent.
    """
    spent, total = row["verdict_tokens"], tokens(row)
    return {one["hash"]: spent[one["order"]] if one["order"] < len(spent) else total for one in correct(row)}


def best_at_tokens(row: Row, budget: float) -> float | None:
    """Best speed-up among the verdicts that were in when so many base and fork tokens had been spent."""
    at = tokens_at_verdicts_of(row)
    return max((one["speedup"] for one in correct(row) if at[one["hash"]] <= budget), default=None)


def accepted(row: Row) -> float | None:
    return (row["accepted"] or {}).get("speedup")


def answered(row: Row) -> int:
    """Answer tokens that the base decoded: an early end returns a candidate's answer, whose tokens a fork has had."""
    return int(row["answer_tokens"]) if row["ended_by"] == "reasoning" else 0


def tokens(row: Row) -> int:
    """All that the engine generated for a search."""
    return int(row["reasoning_tokens"] + answered(row) + row["fork_tokens"])


def rate(row: Row) -> float:
    """Tokens a second of the base while it reasoned."""
    return float(row["reasoning_tokens"] / (row["reasoning_s"] or row["wall_s"]))


def compare(row: Row, alone: Row, target: float) -> dict[str, Any]:
    """One trace of a configuration beside its sequential run.

    gain: sequential's time over this one's, to an answer of at least `target`; 1.0 when it has none. gain_floor: the
    same with sequential's compiling and queueing taken off its time and nothing off this one's.
    """
    speed, final = accepted(row), accepted(alone)
    met = bool(speed and speed >= target)
    times, spent = alone["client_s"], tokens(alone)
    return {
        "trace": row["trace"],
        "iteration": row["iteration"],
        "group": row["group"],
        "seed": row["seed"],
        "met": met,
        "gain": times / row["client_s"] if met else 1.0,
        "gain_floor": without_compiling(alone) / row["client_s"] if met else 1.0,
        "time_over_sequential": row["client_s"] / times,
        "accepted": speed,
        "accepted_over_final": speed / final if speed and final else None,
        "best_by_time": {f"{share:.0%}": _over(best_at_seconds(row, share * times), final) for share in SHARES},
        "best_by_tokens": {f"{share:.0%}": _over(best_at_tokens(row, share * spent), final) for share in SHARES},
        "base_rate_over_sequential": rate(row) / rate(alone),
        "spent": where_time_went(row),
    }


def _over(speed: float | None, final: float | None) -> float | None:
    return (speed or 0.0) / final if final else None


def feedback(rows: Sequence[Row]) -> dict[str, Any]:
    """Verdicts and what they cost; per minute: of the searches' own time, added up, for profiles until the last one."""
    judged = [one for row in rows for one in row["candidates"] if one["verdict_s"] is not None]
    kinds = sorted({one["kind"] for one in judged if one.get("kind")})
    good = sum(len(correct(row)) for row in rows)
    profiled = sum(one["profiled"] for row in rows for one in correct(row))
    seconds, spent = sum(row["client_s"] for row in rows), sum(tokens(row) for row in rows)
    with_profile = sum(max([row["client_s"], *(one.get("profile_s") or 0.0 for one in correct(row))]) for row in rows)
    return {
        "correct": good,
        "profiled": profiled,
        "correct_per_minute": 60 * good / seconds,
        "correct_per_1000_tokens": 1000 * good / spent,
        "profiled_per_minute": 60 * profiled / with_profile,
        "profiled_per_1000_tokens": 1000 * profiled / spent,
        **latency(judged),
        "by_kind": {kind: latency([one for one in judged if one.get("kind") == kind]) for kind in kinds},
    }


def latency(judged: Sequence[Row]) -> dict[str, float | int | None]:
    """From a candidate's submission to its verdict, seconds; p95: the least that 95 % of them don't exceed."""
    seconds = sorted(one["verdict_s"] - one["submitted_s"] for one in judged)
    return {
        "verdicts": len(seconds),
        "latency_p50_s": statistics.median(seconds) if seconds else None,
        "latency_p95_s": seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
        "queued_s": statistics.fmean(one["stages"].get("queued", 0.0) for one in judged) if judged else None,
        "compile_s": statistics.fmean(one["stages"].get("compile", 0.0) for one in judged) if judged else None,
    }


def engine_tokens(rows: Sequence[Row]) -> dict[str, int]:
    """By kind. wasted: of forks that gave no candidate of their own; harvested: candidates that cost no token."""
    forks = [fork for row in rows for fork in row["forks"]]
    first = {(id(row), one["hash"]): min(one["forks"], default=0) for row in rows for one in row["candidates"]}
    own = {
        (id(row), fork["n"])
        for row in rows
        for fork in row["forks"]
        if first.get((id(row), fork["candidate"])) == fork["n"]
    }
    wasted = sum(fork["tokens"] for row in rows for fork in row["forks"] if (id(row), fork["n"]) not in own)
    return {
        "reasoning": sum(row["reasoning_tokens"] for row in rows),
        "answer": sum(answered(row) for row in rows),
        "fork": sum(row["fork_tokens"] for row in rows),
        "wasted": wasted,
        "harvested_candidates": sum(one["source"] == "draft" for row in rows for one in row["candidates"]),
        "prefix_reused": sum(fork["prefix_reused"] for fork in forks),
        "prefix_computed": sum(fork["prefix_computed"] for fork in forks),
    }


def over(mine: Row, alone: Row) -> dict[str, float | None]:
    """Rates of feedback over sequential's; None where sequential has none."""
    kinds = ("correct_per_minute", "correct_per_1000_tokens", "profiled_per_minute", "profiled_per_1000_tokens")
    return {kind: mine[kind] / alone[kind] if alone[kind] else None for kind in kinds}


def utilisation(phases: Sequence[Row], evaluators: int, busy_s: float) -> dict[str, Any]:
    """Shares of the evaluators' time over whole phases, and their seconds by outcome as the pool's account has them.

    busy_s: of work that got a verdict, what several workers did at once on one GPU counted once; the account counts it
    for each, and has what was killed. useful: without what was superseded or killed.
    """
    available = evaluators * sum(phase["wall_s"] for phase in phases)
    spent = [phase["gpu_seconds"] for phase in phases]
    outcomes = dict.fromkeys(outcome for one in spent for outcome in one)
    seconds = {outcome: sum(one.get(outcome, 0.0) for one in spent) for outcome in outcomes}
    in_time, late = seconds.get("useful", 0.0), seconds.get("superseded", 0.0)
    return {
        "busy": (busy_s + seconds.get("cancelled", 0.0)) / available,
        "useful": busy_s * in_time / (in_time + late) / available if in_time else 0.0,
        "gpu_seconds": {outcome: round(value, 3) for outcome, value in seconds.items()},
    }


def summarise(rows: Sequence[Row], phases: Sequence[Row], evaluators: int, target: float) -> list[dict[str, Any]]:
    """One line a configuration and group, and one for all groups; only what sequential has played, too.

    The last line of a configuration has its evaluators' shares: they serve all groups at once.
    """
    alone = {key_of(row): row for row in rows if row["configuration"] == SEQUENTIAL}
    lines = []
    for name in dict.fromkeys(row["configuration"] for row in rows):
        mine = [row for row in rows if row["configuration"] == name and key_of(row) in alone]
        groups = list(dict.fromkeys(row["group"] for row in mine))
        for group in [*groups, "all"] if len(groups) > 1 else groups:
            part = [row for row in mine if group in (row["group"], "all")]
            pairs = [(row, alone[key_of(row)]) for row in part]
            lines.append({"configuration": name, "group": group, **_line(pairs, target)})
        if mine:
            lines[-1]["evaluators"] = _evaluators(name, mine, phases, evaluators)
    return lines


def key_of(row: Row) -> tuple[str, int, int]:
    """What a configuration plays once."""
    return row["trace"], row["iteration"], row["seed"]


def _evaluators(name: str, rows: Sequence[Row], phases: Sequence[Row], evaluators: int) -> dict[str, Any]:
    own = [phase for phase in phases if phase["configuration"] == name]
    used = shares(rows, evaluators)
    wall = sum(phase["wall_s"] for phase in own)
    whole = utilisation(own, evaluators, used["busy_s"] or 0.0) if own else _NOTHING_USED
    engine = sum(phase["wall_s"] * phase.get("engine_gpus", 1) for phase in own)
    paused = sum(phase.get("engine_paused_s", 0.0) for phase in own)
    seconds = {"engine_gpu_seconds": round(engine, 1), "engine_paused_s": round(paused, 1)}
    rate_s = {"correct_per_wall_minute": 60 * sum(len(correct(row)) for row in rows) / wall if wall else None}
    return whole | used | seconds | rate_s | {"kv": _kv(own)}


def _kv(phases: Sequence[Row]) -> dict[str, float]:
    """What the KV tier counted over whole phases, where there is one of ours."""
    names = dict.fromkeys(name for phase in phases for name in phase.get("kv", {}))
    return {name: sum(phase.get("kv", {}).get(name, 0) for phase in phases) for name in names}


def _line(pairs: Sequence[tuple[Row, Row]], target: float) -> dict[str, Any]:
    found = [compare(row, alone, target) for row, alone in pairs]
    rows, others = [row for row, _ in pairs], [alone for _, alone in pairs]
    mine, its = feedback(rows), feedback(others)
    kept = mean(one["base_rate_over_sequential"] for one in found)

    def curve(kind: str) -> dict[str, float]:
        return {share: statistics.fmean(one[kind][share] or 0.0 for one in found) for share in found[0][kind]}

    return {
        "traces": len(found),
        "commits": sorted({row["commit"] for row in rows if row.get("commit")}),
        "dates": sorted({row["date"][:10] for row in rows if row.get("date")}),
        "met": sum(one["met"] for one in found),
        "gain": mean(one["gain"] for one in found),
        "gain_floor": mean(one["gain_floor"] for one in found),
        "gain_by_seed": {
            str(seed): mean(one["gain"] for one in found if one["seed"] == seed)
            for seed in sorted({one["seed"] for one in found})
        },
        "worst_gain": min(one["gain"] for one in found),
        "worst_time_over_sequential": max(one["time_over_sequential"] for one in found),
        "time_over_sequential": mean(one["time_over_sequential"] for one in found),
        "accepted_over_final": mean(one["accepted_over_final"] for one in found),
        "best_by_time": curve("best_by_time"),
        "best_by_tokens": curve("best_by_tokens"),
        "base_rate_over_sequential": kept,
        "base_slowdown": 1 - kept if kept else None,
        "worst_base_slowdown": 1 - min(one["base_rate_over_sequential"] for one in found),
        "tokens_per_s": statistics.median(rate(row) for row in rows),
        "feedback": mine,
        "feedback_over_sequential": over(mine, its),
        "tokens": engine_tokens(rows),
        "by_trace": found,
    }
