"""The candidates of one search: each distinct one is judged once; the criterion sees the verdicts in their order."""

from __future__ import annotations

from collections.abc import Callable

from specgen_engine.controller.events import Source
from specgen_engine.controller.report import CandidateRecord, SearchRecord, summary_of
from specgen_engine.controller.termination import Decision, Scored, best, parse_termination
from specgen_engine.evaluation.base import Candidate, Job, Pool, Stage, Status, Task, Verdict

PRIORITY = {"fork": 0.0, "draft": 0.0, "base": 1.0}


class Competition:
    """Writes into the search's record; the pool does the work. Candidates are known by content hash."""

    def __init__(
        self, task: Task, termination: str, pool: Pool, record: SearchRecord, now: Callable[[], float]
    ) -> None:
        self.task, self.pool, self.record, self.now = task, pool, record, now
        self.criterion = parse_termination(termination)
        self.candidates: dict[str, CandidateRecord] = {}
        self.jobs: dict[str, Job] = {}
        self.scored: list[Scored] = []
        self.own: CandidateRecord | None = None

    def enter(
        self, source: str, origin: Source, fork: int | None, recorded: str | None
    ) -> tuple[CandidateRecord, Job | None]:
        """The candidate's record and, when it is new, the job that judges it."""
        candidate = Candidate(source)
        record, job = self.candidates.get(candidate.hash), None
        if record is None:
            record = CandidateRecord(candidate.hash, origin, self.now(), recorded_answer=recorded)
            self.candidates[record.hash] = record
            self.record.candidates.append(record)
            job = self.pool.submit(self.task, candidate, search=self.record.id, priority=PRIORITY[origin])
            self.jobs[record.hash] = job
        if fork is not None:
            record.forks.append(fork)
        if origin == "base":
            self.own = record
        return record, job

    def judge(self, record: CandidateRecord, verdict: Verdict) -> None:
        self.jobs.pop(record.hash, None)
        record.status, record.speedup, record.interval = verdict.status, verdict.speedup, verdict.interval
        record.candidate_ms, record.reference_ms = verdict.candidate_ms, verdict.reference_ms
        record.reason, record.digest, record.stages = verdict.reason, verdict.digest, dict(verdict.stages)
        record.device, record.sandbox, record.verdict_s = verdict.device, verdict.sandbox, self.now()
        worked = sum(seconds for stage, seconds in verdict.stages.items() if stage != Stage.QUEUED)
        self.record.evaluation_s = round(self.record.evaluation_s + worked, 4)
        self.scored.append(Scored(record.hash, verdict.status, verdict.speedup, record.source, len(self.scored)))
        self.record.best = summary_of(self.leader())

    def decide(self) -> Decision | None:
        return self.criterion.decide(self.scored)

    def leader(self) -> CandidateRecord | None:
        """The fastest correct candidate so far."""
        top = best(self.scored)
        return self.candidates[top.hash] if top else None

    def own_alone(self) -> bool:
        """Only the base's own answer is left to judge: nothing competes with it, so its verdict is waited for."""
        return self.own is not None and set(self.jobs) == {self.own.hash} and len(self.candidates) == 1

    def beats_own_answer(self, winner: CandidateRecord) -> bool:
        """An answer without a verdict is only replaced by a kernel that is known to be faster than the reference."""
        if winner is self.own or winner.source == "base":
            return False
        unknown = self.own is not None and self.own.status is None
        return not unknown or (winner.speedup or 0.0) > 1.0

    def cancel(self) -> None:
        for job in self.jobs.values():
            job.cancel()

    def close(self) -> None:
        """Whoever has no verdict yet gets none."""
        self.pool.cancel_search(self.record.id)
        for record in self.record.candidates:
            if record.status is None:
                record.status, record.reason = Status.CANCELLED, "the search ended first"
        self.record.final = summary_of(self.own)
