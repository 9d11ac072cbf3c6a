"""Spans of time: their union, what two unions share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Seconds of one clock."""

    start: float
    end: float


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time, ascending, without overlaps."""
    found: list[Span] = []
    for span in sorted(one for one in spans if one.end > one.start):
        if found and span.start <= found[-1].end:
            found[-1] = Span(found[-1].start, max(found[-1].end, span.end))
        else:
            found.append(span)
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(span.end - span.start for span in spans)


def common(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Seconds that two unions share."""
    return sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in first for b in second)
