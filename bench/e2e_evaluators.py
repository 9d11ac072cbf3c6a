"""How the evaluators were used, from the candidates' own times. Pure: rows of bench.end_to_end in, shares out.

A verdict tells how long it was queued, compiled, checked, timed and profiled, not when: queueing is put first, the
GPU's work last. Candidates whose search ended before their verdict are not in it; the pool's account (`busy`) has them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bench.spans import Span, common, length, union
from specgen_engine.pools.base import busy_seconds

Row = Mapping[str, Any]


def shares(rows: Sequence[Row], evaluators: int) -> dict[str, float | None]:
    """Of the evaluators' time, by the candidates that got a verdict.

    held: some candidate compiles, is checked, timed or profiled. busy_while_waiting: of the time in which a candidate
    waited for an evaluator, the share in which one was checked, timed or profiled; None when none ever waited.
    waiting_s: that time. busy_s: in which some candidate is checked, timed or profiled, added up over the devices; what
    several do at once on one is counted once. Rows of one phase share a clock.
    """
    waited = worked = held = whole = seconds = 0.0
    for phase in dict.fromkeys(row.get("phase", 0) for row in rows):
        mine = [row for row in rows if row.get("phase", 0) == phase]
        busy, hold, waiting = _by_device(mine)
        whole += max(row["began_s"] + row["client_s"] for row in mine) - min(row["began_s"] for row in mine)
        held += sum(length(spans) for spans in hold.values())
        seconds += sum(length(spans) for spans in busy.values())
        waited += length(waiting)
        worked += sum(common(spans, waiting) for spans in busy.values())
    return {
        "held": held / (evaluators * whole) if whole else None,
        "busy_while_waiting": worked / (evaluators * waited) if waited else None,
        "waiting_s": waited,
        "busy_s": seconds,
    }


def over_time(rows: Sequence[Row], evaluators: int, step_s: float) -> tuple[list[float], list[float]]:
    """Shares (held, busy) of the evaluators' time in each step from the first search's start to the last one's end.

    Of the phase with most rows: a phase that was gone on with later says little about its course. Raises ValueError
    for a step of zero seconds or less.
    """
    if step_s <= 0:
        raise ValueError(f"step_s {step_s}: needs more than 0")
    phases = [row.get("phase", 0) for row in rows]
    mine = [row for row in rows if row.get("phase", 0) == max(phases, key=phases.count)]
    if not mine:
        return [], []
    begin, end = min(row["began_s"] for row in mine), max(row["began_s"] + row["client_s"] for row in mine)
    steps = [Span(at, at + step_s) for at in (begin + n * step_s for n in range(math.ceil((end - begin) / step_s)))]
    busy, hold, _ = _by_device(mine)
    return _course(hold, steps, evaluators), _course(busy, steps, evaluators)


def _course(by_device: Mapping[str, Sequence[Span]], steps: Sequence[Span], evaluators: int) -> list[float]:
    return [
        sum(common(spans, [step]) for spans in by_device.values()) / (evaluators * (step.end - step.start))
        for step in steps
    ]


def _by_device(rows: Sequence[Row]) -> tuple[dict[str, list[Span]], dict[str, list[Span]], list[Span]]:
    """By device: GPU work, and any work; and the time in which something waited."""
    busy, hold, waiting = defaultdict[str, list[Span]](list), defaultdict[str, list[Span]](list), list[Span]()
    for row in rows:
        for one in row["candidates"]:
            if one["verdict_s"] is None:
                continue
            begin, end = row["began_s"] + one["submitted_s"], row["began_s"] + one["verdict_s"]
            taken = min(end, begin + one["stages"].get("queued", 0.0))
            waiting.append(Span(begin, taken))
            busy[one["device"]].append(Span(max(taken, end - busy_seconds(one["stages"])), end))
            hold[one["device"]].append(Span(taken, end))
    return {k: union(v) for k, v in busy.items()}, {k: union(v) for k, v in hold.items()}, union(waiting)
