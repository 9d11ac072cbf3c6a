"""Profiles of correct candidates: jobs of their own, behind the verdicts.

A verdict ends a reasoning and must not wait for ncu. What is profiled while the reasoning goes on tells what bounds a
kernel; once the search has ended only the accepted candidate's profile is still waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from specgen_engine.controller.report import CandidateRecord, SearchRecord
from specgen_engine.evaluation.base import Candidate, Job, Pool, Stage, Status, Task

LAST_S = 60.0
"""Seconds that the accepted candidate's profile gets after the search's end; ncu took 22.6 s on an H200."""


class Profiling:
    """tool: as --specgen-evaluation-profile has it; `off` asks for nothing. told: called when a profile is in.

    Its jobs are a search of their own in the pool, `ID/profile`: they outlive the verdicts' jobs.
    """

    def __init__(
        self, tool: str, task: Task, pool: Pool, record: SearchRecord, now: Callable[[], float],
        told: Callable[[CandidateRecord], None],
    ) -> None:  # fmt: skip
        self._tool, self._task, self._pool, self._record = tool, task, pool, record
        self._now, self._told = now, told
        self._search = f"{record.id}/profile"
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, record: CandidateRecord, candidate: Candidate) -> None:
        """Profile a candidate whose verdict says that it is correct."""
        if self._tool == "off" or record.status is not Status.CORRECT:
            return
        job = self._pool.submit(
            self._task, candidate, search=self._search, stage="profile", options={"profile": self._tool},
            fork=max(record.forks, default=0),
        )  # fmt: skip
        self._jobs[record.hash] = job
        self._record.profiling = len(self._jobs)
        task = asyncio.create_task(self._take(record, job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, record: CandidateRecord, job: Job) -> None:
        verdict = await job.verdict()
        self._jobs.pop(record.hash, None)
        self._record.profiling = len(self._jobs)
        worked = sum(seconds for stage, seconds in verdict.stages.items() if stage != Stage.QUEUED)
        self._record.evaluation_s = round(self._record.evaluation_s + worked, 4)
        if verdict.profile:
            record.profile, record.profile_s = str(verdict.profile.get("text", "")), self._now()
            self._told(record)

    def keep(self, accepted: str | None) -> None:
        """The search is over: of its profiles only the accepted candidate's is still of use."""
        for name, job in self._jobs.items():
            if name != accepted:
                job.cancel()

    async def close(self) -> None:
        """Wait for what is kept, then leave nothing behind."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST_S)
        self._pool.cancel_search(self._search)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._record.profiling = 0
