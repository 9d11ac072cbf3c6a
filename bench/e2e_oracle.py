"""What the rows of bench.end_to_end are held against: the oracle's gain, at this run's rates and service times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.e2e_configurations import SEQUENTIAL
from bench.e2e_report import key_of, label, rate
from bench.recordings import Encode, Measured, folder_of, subject_of, texts_of
from bench.service_times import Kind, Service, ServiceTimes, kind_of
from bench.virtual_time import Machine, oracle_seconds
from specgen_engine.controller.answers import extract_candidate
from specgen_engine.controller.termination import Speedup
from specgen_engine.evaluation.base import source_hash
from specgen_engine.pools.base import busy_seconds
from specgen_engine.replay.trace import Iteration, Trace

Row = Mapping[str, Any]
Played = Sequence[tuple[Trace, Iteration]]


def recorded(played: Played) -> dict[str, tuple[str, Kind]]:
    """Of every recorded answer, by its candidate's hash: "folder/task/iter-N/answer.md" and what it is written in."""
    found: dict[str, tuple[str, Kind]] = {}
    for trace, iteration in played:
        for answer, text in texts_of(iteration).items():
            if source := extract_candidate(text):
                name = f"{folder_of(trace, iteration)}/{answer}.md"
                found.setdefault(source_hash(source), (name, kind_of(source)))
    return found


def name_kinds(rows: Sequence[dict[str, Any]], answers: Mapping[str, tuple[str, Kind]]) -> None:
    """Write into each candidate what it is written in; one that is no recorded answer has none."""
    for one in (candidate for row in rows for candidate in row["candidates"]):
        if one["hash"] in answers:
            one["kind"] = answers[one["hash"]][1]


def service_times(rows: Sequence[Row], answers: Mapping[str, tuple[str, Kind]]) -> ServiceTimes:
    """Seconds that each answer's evaluation took in these rows, without queueing; the least of several."""
    times = ServiceTimes()
    for one in (candidate for row in rows for candidate in row["candidates"]):
        if one["verdict_s"] is None or one["hash"] not in answers:
            continue
        name, kind = answers[one["hash"]]
        took = Service(one["stages"].get("compile", 0.0), busy_seconds(one["stages"]))
        known = times.rows.get(name)
        times.rows[name] = kind, min(took, known[1], key=sum) if known else took
    return times


def oracle_gains(report: Row, played: Played, scores: dict[str, dict[str, Any]], encode: Encode) -> dict[str, float]:
    """By what was played: sequential's measured time over that of the first recorded fork that meets the target alone.

    That fork decodes at sequential's measured rate and is evaluated at once, in the seconds its evaluation took in this
    run (else the median of its kind). scores say which fork meets the target. 1.0 where none does in time.
    """
    times, gains = service_times(report["rows"], recorded(played)), dict[str, float]()
    for trace, iteration in played:
        alone = [
            row
            for row in report["rows"]
            if row["configuration"] == SEQUENTIAL and key_of(row)[:2] == (trace.name, iteration.number)
        ]
        if not alone:
            continue
        machine = Machine(statistics.median(map(rate, alone)), evaluators=report["evaluators"])
        recording = subject_of(trace, iteration, Measured(scores, times), encode).recording
        ideal = oracle_seconds(recording, machine, Speedup(report["target"]))
        seconds = statistics.median(row["client_s"] for row in alone)
        name = label({"trace": trace.name, "iteration": iteration.number})
        gains[name] = max(1.0, seconds / ideal) if ideal else 1.0
    return gains
