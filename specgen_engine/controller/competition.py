"""The candidates of one search: each distinct one is judged once; the criterion sees the verdicts in their order."""

from __future__ import annotations

from collections.abc import Callable

from specgen_engine.controller.answers import normalised_source
from specgen_engine.controller.events import Source
from specgen_engine.controller.report import CandidateRecord, DecisionRecord, SearchRecord, summary_of
from specgen_engine.controller.termination import (
    Decision,
    Progress,
    Scored,
    best,
    parse_termination,
    watches_progress,
)
from specgen_engine.evaluation.base import Candidate, Job, Pool, Stage, Status, Task, Verdict

PRIORITY = {"fork": 0.0, "draft": 0.0, "base": 1.0}


class Competition:
    """Writes into the search's record; the pool does the work.

    Candidates that differ only in comments, docstrings or layout are one: the first of them is judged.
    """

    def __init__(
        self, task: Task, termination: str, pool: Pool, record: SearchRecord, now: Callable[[], float]
    ) -> None:
        self.task, self.pool, self.record, self.now = task, pool, record, now
        self.criterion = parse_termination(termination)
        self.candidates: dict[str, CandidateRecord] = {}
        self.jobs: dict[str, Job] = {}
        self.texts: dict[str, Candidate] = {}
        self.scored: list[Scored] = []
        self.own: CandidateRecord | None = None
        self.watches_progress = watches_progress(self.criterion)
        self._by_meaning: dict[str, CandidateRecord] = {}

    def enter(
        self, source: str, origin: Source, fork: int | None, recorded: str | None, at_token: int = 0
    ) -> tuple[CandidateRecord, Job | None]:
        """The candidate's record and, when it is new, the job that judges it."""
        candidate, meaning = Candidate(source), normalised_source(source)
        record, job = self.candidates.get(candidate.hash) or self._by_meaning.get(meaning), None
        if record is None:
            record = CandidateRecord(candidate.hash, origin, self.now(), recorded_answer=recorded, at_token=at_token)
            self.candidates[record.hash] = self._by_meaning[meaning] = record
            self.record.candidates.append(record)
            self.texts[record.hash] = candidate
            job = self.pool.submit(
                self.task, candidate, search=self.record.id, priority=PRIORITY[origin], fork=fork or 0
            )
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
        record.roofline, record.order = verdict.roofline, len(self.scored)
        self.scored.append(scored_of(record))
        self.record.best = summary_of(self.leader())

    def decide(self, progress: Progress) -> Decision | None:
        """Ask the criterion; every question that could get a new answer is written into the record."""
        decision = self.criterion.decide(self.scored, progress)
        asked = self.record.decisions
        if decision is not None or not asked or asked[-1].verdicts != len(self.scored):
            accepted, reason = (decision.hash, decision.reason) if decision else (None, "")
            used = (
                progress.seconds,
                len(self.scored),
                progress.reasoning_tokens,
                progress.tokens,
                progress.evaluator_s,
            )
            asked.append(DecisionRecord(*used, accepted, reason))
        return decision

    def best_speedup(self) -> float:
        """Of the fastest correct candidate so far; 0 without one."""
        top = best(self.scored)
        return (top.speedup or 0.0) if top else 0.0

    def leader(self) -> CandidateRecord | None:
        """The fastest correct candidate so far."""
        top = best(self.scored)
        return self.candidates[top.hash] if top else None

    def awaits_own(self) -> bool:
        """The base's own answer is still to be judged."""
        return self.own is not None and self.own.hash in self.jobs

    def beats_own_answer(self, winner: CandidateRecord) -> bool:
        """An answer without a verdict is only replaced by a kernel that is known to be faster than the reference."""
        if winner is self.own or winner.source == "base":
            return False
        unknown = self.own is not None and self.own.status is None
        return not unknown or (winner.speedup or 0.0) > 1.0

    def cancel(self, keep_own: bool = False) -> None:
        for name, job in self.jobs.items():
            if not (keep_own and self.own is not None and name == self.own.hash):
                job.cancel()

    def close(self) -> None:
        """Whoever has no verdict yet gets none."""
        self.pool.cancel_search(self.record.id)
        for record in self.record.candidates:
            if record.status is None:
                record.status, record.reason = Status.CANCELLED, "the search ended first"
        self.record.final = summary_of(self.own)


def scored_of(record: CandidateRecord) -> Scored:
    """A judged candidate as criteria see it."""
    assert record.status is not None
    assert record.order is not None
    return Scored(
        record.hash, record.status, record.speedup, record.source, record.order, record.at_token, record.roofline
    )


def decide_again(record: SearchRecord) -> list[Decision | None]:
    """What the criterion of a finished search says to each of its logged questions; equal to what it said then."""
    criterion = parse_termination(record.termination)
    judged = sorted((one for one in record.candidates if one.order is not None), key=lambda one: one.order or 0)
    scored = [scored_of(one) for one in judged]
    return [
        criterion.decide(
            scored[: asked.verdicts],
            Progress(asked.t_s, asked.reasoning_tokens, asked.tokens, asked.evaluator_s),
        )
        for asked in record.decisions
    ]
