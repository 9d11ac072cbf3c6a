"""Geometry of the report's drawings: pure functions from attempts to bars, marks and steps in seconds and speed-ups."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from specgen_engine.agent.base import Attempt


class Bar(NamedTuple):
    """kind: reasoning | answer | fork | evaluation. start, end: seconds of the run; row: below the lane's top."""

    kind: str
    start: float
    end: float
    row: int
    title: str


class Lane(NamedTuple):
    """One iteration. ended_s: when its reasoning was ended early, None when it ran to its own end."""

    search: int
    iteration: int
    bars: tuple[Bar, ...]
    rows: int
    ended_s: float | None


class Point(NamedTuple):
    """Best speed-up known at a time and after so many generated tokens."""

    seconds: float
    tokens: int
    speedup: float


def lane_of(attempt: Attempt) -> Lane:
    """Bars of one iteration: the base on row 0, forks and evaluations packed below it without overlap."""
    start, search = attempt.started_s, attempt.generation.search or {}
    reasoning_s = search.get("reasoning_s") or attempt.generation.seconds
    bars = [
        Bar("reasoning", start, start + reasoning_s, 0, f"reasoning, {search.get('reasoning_tokens', '?')} tokens"),
        Bar("answer", start + reasoning_s, attempt.generated_s, 0, "answer"),
    ]
    free: list[float] = []
    for fork in search.get("forks", []):
        end = start + (fork["finished_s"] or search["wall_s"])
        title = f"fork {fork['n']} at token {fork['at_token']}: {fork['tokens']} tokens"
        bars.append(_packed(free, "fork", start + fork["started_s"], end, title))
    for one in search.get("candidates", []):
        end = start + (one["verdict_s"] or search["wall_s"])
        speed = f" {one['speedup']:.2f}x" if one["speedup"] else ""
        bars.append(
            _packed(free, "evaluation", start + one["submitted_s"], end, f"{one['hash']}: {one['status']}{speed}")
        )
    if attempt.judgement is not None and not attempt.judgement.by_endpoint and attempt.ended_s is not None:
        title = f"{attempt.judgement.hash}: {attempt.judgement.status}"
        bars.append(_packed(free, "evaluation", attempt.generated_s, attempt.ended_s, title))
    early = start + reasoning_s if search.get("ended_by") == "criterion" else None
    return Lane(attempt.search, attempt.iteration, tuple(bars), 1 + len(free), early)


def _packed(free: list[float], kind: str, start: float, end: float, title: str) -> Bar:
    for row, until in enumerate(free):
        if until <= start:
            free[row] = end
            return Bar(kind, start, end, row + 1, title)
    free.append(end)
    return Bar(kind, start, end, len(free), title)


def progress_of(attempts: Sequence[Attempt]) -> list[Point]:
    """Best-so-far after each verdict, forks' verdicts included, in the order of time."""
    verdicts: list[tuple[float, float]] = []
    for one in attempts:
        search = one.generation.search or {}
        for candidate in search.get("candidates", []):
            if candidate["speedup"] and candidate["verdict_s"] is not None:
                verdicts.append((one.started_s + candidate["verdict_s"], candidate["speedup"]))
        if one.speedup is not None and one.ended_s is not None:
            verdicts.append((one.ended_s, one.speedup))
    points, best = list[Point](), 0.0
    for seconds, speedup in sorted(verdicts):
        if speedup > best:
            best = speedup
            points.append(Point(seconds, round(sum(_generated_by(one, seconds) for one in attempts)), best))
    return points


def _generated_by(attempt: Attempt, seconds: float) -> float:
    """Tokens of an attempt up to a time, taken as spread evenly over its generation."""
    length = max(attempt.generated_s - attempt.started_s, 1e-9)
    return attempt.generation.tokens * min(max((seconds - attempt.started_s) / length, 0.0), 1.0)


def improvements(attempts: Sequence[Attempt]) -> list[tuple[Attempt, list[str]]]:
    """Attempts that were the best when judged, each with its unified diff to the best before it."""
    found: list[tuple[Attempt, list[str]]] = []
    order = sorted((one for one in attempts if one.speedup is not None), key=lambda one: one.ended_s or 0.0)
    best: Attempt | None = None
    for one in order:
        if best is None or (one.speedup or 0.0) > (best.speedup or 0.0):
            before = (best.source or "").splitlines() if best else []
            diff = difflib.unified_diff(before, (one.source or "").splitlines(), "before", "after", lineterm="", n=3)
            found.append((one, list(diff)))
            best = one
    return found
