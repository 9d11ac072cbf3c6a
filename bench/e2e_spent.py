"""Where the time of each search of bench.end_to_end went, up to the answer it returned. Pure: a row in, seconds out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgen_engine.pools.base import busy_seconds

Row = Mapping[str, Any]


def accepted_candidate(row: Row) -> Row | None:
    """The candidate whose answer was returned."""
    name = (row["accepted"] or {}).get("hash")
    return next((one for one in row["candidates"] if one["hash"] == name and one["verdict_s"] is not None), None)


def where_time_went(row: Row) -> dict[str, float] | None:
    """Seconds, which add up to client_s; None without an accepted candidate.

    reasoning: until the point at which the accepted answer was forked (to the reasoning's end for the base's own).
    answer: its decoding. queued, compile, check_and_time: of its evaluation. rest: handing over, other candidates that
    were waited for after its verdict, and the reply.
    """
    one = accepted_candidate(row)
    if one is None:
        return None
    writer = next((fork for fork in row["forks"] if fork["n"] == min(one["forks"], default=None)), None)
    if writer is None and one["source"] == "fork":
        return None
    drafted = one["source"] == "draft"
    since = one["submitted_s"] if drafted else writer["started_s"] if writer else row["reasoning_s"]
    spent = {
        "reasoning": since,
        "answer": one["submitted_s"] - since,
        "queued": one["stages"].get("queued", 0.0),
        "compile": one["stages"].get("compile", 0.0),
        "check_and_time": busy_seconds(one["stages"]),
    }
    return spent | {"rest": row["client_s"] - sum(spent.values())}


def without_compiling(row: Row) -> float:
    """client_s without the accepted candidate's compiling and queueing: what no faster compiler can shorten."""
    stages = (accepted_candidate(row) or {"stages": {}})["stages"]
    return float(row["client_s"] - stages.get("queued", 0.0) - stages.get("compile", 0.0))
