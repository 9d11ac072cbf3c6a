"""What a run of bench.end_to_end can still finish: recorded tokens, measured decode rate, seconds left. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bench.e2e_report import rate
from specgen_engine.replay.trace import Iteration, Trace

Chain = TypeVar("Chain")


def tokens_of(trace: Trace, iteration: Iteration, reasoning_tokens: int) -> float:
    """Tokens of an iteration's reasoning and answer.

    reasoning_tokens: of the trace's first reasoning, as the engine counts them; the rest goes by its characters.
    """
    per_character = reasoning_tokens / max(1, len(trace.iterations[0].reasoning))
    return per_character * (len(iteration.reasoning) + len(iteration.final))


def measured_rate(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens a second of one base, median of the searches so far; None before the first."""
    rates = [rate(row) for row in rows]
    return statistics.median(rates) if rates else None


def why_left_out(tokens: float, tokens_per_s: float | None, left_s: float) -> str | None:
    """Why a search that reasons to its end is not started; None when it may be done in time, or the rate is unknown."""
    if left_s <= 0:
        return "the budget is over"
    if tokens_per_s is None or tokens / tokens_per_s <= left_s:
        return None
    return (
        f"{tokens:.0f} tokens at {tokens_per_s:.0f}/s take {tokens / tokens_per_s:.0f} s, "
        f"{left_s:.0f} s of the budget are left"
    )


def longest_first(chains: Sequence[Chain], tokens: Callable[[Chain], float]) -> list[Chain]:
    """The longest one leads, so that it isn't left to run alone at the end; the others keep their order."""
    if not chains:
        return []
    first = max(range(len(chains)), key=lambda index: tokens(chains[index]))
    return [chains[first], *chains[:first], *chains[first + 1 :]]
