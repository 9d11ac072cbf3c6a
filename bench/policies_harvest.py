"""Modules drafted whole in a reasoning: their share of its fences, and the verdicts that come before a fork's would."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.recordings import Subject


def harvest_row(subject: Subject, fork_points: Sequence[int], rate: float) -> dict[str, Any]:
    """Of one reasoning. A module's verdict comes before the next fork's answer is even written; lead_s: by how much.

    modules: closed fences that define Model or ModelNew; complete: those that import torch too; drafts: those that
    define ModelNew, which is what a live search harvests.
    """
    leads = []
    recording = subject.recording
    for at in subject.harvest["complete_at"]:
        following = next((point for point in fork_points if point >= at), None)
        answer = recording.answer_at(following) if following is not None else None
        if following is not None:
            tokens = answer.tokens if answer else 0
            leads.append((following + tokens - at) / rate)
    harvest = subject.harvest
    return {
        "trace": f"{recording.family}/{recording.name}",
        **{name: harvest[name] for name in ("fences", "modules", "complete", "drafts")},
        "share_complete": harvest["complete"] / harvest["fences"] if harvest["fences"] else None,
        "verdicts_before_next_fork": sum(lead > 0 for lead in leads),
        "without_a_later_fork": harvest["complete"] - len(leads),
        "median_lead_s": statistics.median(leads) if leads else None,
    }
