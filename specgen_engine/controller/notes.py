"""What a search tells the world while it runs: the events behind /specgen/events and the OpenTelemetry spans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from specgen_engine.controller.report import CandidateRecord, ForkRecord, LateFork, SearchRecord
from specgen_engine.evaluation.base import Job, Stage

Publish = Callable[[str, dict[str, Any]], None]
PROGRESS_S = 0.25
TAIL_CHARS = 400


def ignore(kind: str, data: dict[str, Any]) -> None:
    """A publish that nobody hears."""


class Notes:
    """Publishes what changes in one search's record. now: seconds since the search began, as in the record."""

    def __init__(self, record: SearchRecord, publish: Publish, now: Callable[[], float]) -> None:
        self._record, self._publish, self._now = record, publish, now
        self._progress_at = -PROGRESS_S

    def started(self) -> None:
        self._say("started", summary_of_search(self._record))

    def progress(self, tokens: int, text: str, state: str) -> None:
        """At most four times a second; tokens: of the base's output so far, text: all of it."""
        now = self._now()
        if now - self._progress_at >= PROGRESS_S:
            self._progress_at = now
            self._say("progress", {"tokens": tokens, "state": state, "tail": text[-TAIL_CHARS:]})

    def fork(self, fork: ForkRecord) -> None:
        self._say("fork", {"fork": asdict(fork)})

    def late(self, late: LateFork) -> None:
        self._say("late_fork", {"late_fork": asdict(late)})

    def candidate(self, candidate: CandidateRecord) -> None:
        self._say("candidate", {"candidate": asdict(candidate)})

    def stage(self, candidate: str, stage: Stage) -> None:
        self._say("stage", {"hash": candidate, "stage": str(stage)})

    async def follow(self, candidate: CandidateRecord, job: Job) -> None:
        """Tell the stages of its evaluation until it has a verdict."""
        async for stage in job.events():
            if candidate.status is None:
                self.stage(candidate.hash, stage)

    def ended(self) -> None:
        self._say("ended", summary_of_search(self._record))

    def _say(self, kind: str, data: dict[str, Any]) -> None:
        self._publish(kind, {"search": self._record.id, "t": self._now(), **data})


def summary_of_search(record: SearchRecord) -> dict[str, Any]:
    """The record without its forks and candidates."""
    return {name: value for name, value in record.to_dict().items() if name not in ("forks", "candidates")}
