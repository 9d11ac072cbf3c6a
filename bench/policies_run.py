"""A search of several iterations, one after the other, under every policy: what it takes, and the best kernel so far.

Between iterations the recorded agent's own feedback applies: a recording cannot react to what a policy kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.recordings import Subject
from bench.virtual_time import Machine, Outcome, sequential

Play = Callable[[int], Outcome]
SHARES = (0.25, 0.5, 0.75, 1.0)


def run_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Whole time and tokens; curve: [seconds, tokens of base and forks, best speed-up so far] at each improvement."""
    seconds, tokens, best = 0.0, 0, 0.0
    curve: list[list[float]] = []
    for outcome in outcomes:
        spent = outcome.base_tokens + outcome.fork_tokens
        for at, speedup in outcome.curve:
            if speedup > best:
                best = speedup
                share = at / outcome.seconds if outcome.seconds else 1.0
                curve.append([round(seconds + at, 1), round(tokens + share * spent), speedup])
        seconds, tokens = seconds + outcome.seconds, tokens + spent
    return {
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "fork_tokens": sum(one.fork_tokens for one in outcomes),
        "forks": sum(one.forks for one in outcomes),
        "verdicts": sum(one.verdicts for one in outcomes),
        "best": best,
        "kept": [one.accepted.speedup if one.accepted else None for one in outcomes],
        "curve": curve,
    }


def best_at(curve: Sequence[Sequence[float]], limit: float, column: int) -> float | None:
    """Best speed-up within a limit of seconds (column 0) or tokens (column 1)."""
    return next((row[2] for row in reversed(curve) if row[column] <= limit), None)


def run_rows(
    name: str,
    subjects: Sequence[Subject],
    machine: Machine,
    criterion: str,
    plays: dict[str, Play],
) -> list[dict[str, Any]]:
    """One row a policy and one for sequential, whose time and tokens the shares refer to."""
    alone = run_of([sequential(one.recording, machine) for one in subjects])
    rows = []
    for policy, play in {"sequential": None, **plays}.items():
        figures = alone if play is None else run_of([play(index) for index in range(len(subjects))])
        rows.append(
            {
                "run": name,
                "iterations": len(subjects),
                "policy": policy,
                "criterion": criterion,
                "tokens_per_s": machine.tokens_per_s,
                "gain": alone["seconds"] / figures["seconds"],
                "best_at_time": {f"{s:.0%}": best_at(figures["curve"], s * alone["seconds"], 0) for s in SHARES},
                "best_at_tokens": {f"{s:.0%}": best_at(figures["curve"], s * alone["tokens"], 1) for s in SHARES},
                **figures,
            }
        )
    return rows
