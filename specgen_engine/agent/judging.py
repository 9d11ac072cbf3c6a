"""Where the loop's candidates are judged: on the endpoint, when it forked and judged them, else on this machine."""

from __future__ import annotations

from typing import Any

import anyio

from specgen_engine.agent.base import AgentError, Judgement
from specgen_engine.evaluation.base import Candidate, Status, Task, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool


class Judge:
    """A local pool, started when it is first needed. One instance serves several searches at once."""

    def __init__(
        self, task: Task, device: str, profile: str = "", workers: int = 1, limits: EvaluationLimits | None = None
    ) -> None:
        self.task, self.device = task, device
        self._pool = LocalPool(workers=workers, device=device, limits=limits or EvaluationLimits())
        self._options = {"profile": profile} if profile else None
        self._started = False
        self._starting = anyio.Lock()

    async def check_task(self) -> None:
        """Raises AgentError when the task fails its own reference or no worker starts."""
        pool = await self._ready()
        if fault := await pool.check_task(self.task):
            raise AgentError(f"task {self.task.name}: {fault}")

    async def judge(self, source: str, search: str) -> Judgement:
        pool = await self._ready()
        job = pool.submit(self.task, Candidate(source), search=search, options=self._options)
        try:
            return judgement_of(await job.verdict())
        finally:
            job.cancel()

    async def _ready(self) -> LocalPool:
        async with self._starting:
            if not self._started:
                try:
                    await self._pool.start()
                except RuntimeError as error:
                    raise AgentError(f"--device {self.device}: no evaluation worker started: {error}") from None
                self._started = True
        return self._pool

    async def close(self) -> None:
        await self._pool.close()


def judgement_of(verdict: Verdict) -> Judgement:
    return Judgement(
        hash=verdict.candidate,
        status=verdict.status,
        speedup=verdict.speedup,
        interval=verdict.interval,
        candidate_ms=verdict.candidate_ms,
        reference_ms=verdict.reference_ms,
        reason=verdict.reason,
        digest=verdict.digest,
        device=verdict.device,
        stages={str(stage): seconds for stage, seconds in verdict.stages.items()},
        profile=_text(verdict.profile),
    )


def judgement_in(search: dict[str, object] | None, source: str) -> Judgement | None:
    """What the endpoint's own evaluators said of this source; None when they gave no verdict of it."""
    wanted = Candidate(source).hash
    rows = search.get("candidates", []) if search else []
    for row in rows if isinstance(rows, list) else []:
        if row["hash"] == wanted and row["status"] not in (None, Status.CANCELLED):
            return Judgement(
                hash=wanted,
                status=Status(row["status"]),
                speedup=row["speedup"],
                interval=tuple(row["interval"]) if row["interval"] else None,
                candidate_ms=row["candidate_ms"],
                reference_ms=row["reference_ms"],
                reason=row["reason"],
                digest=row["digest"],
                device=row["device"],
                stages=row["stages"],
                profile=row.get("profile", ""),
                by_endpoint=True,
            )
    return None


def _text(profile: dict[str, Any] | None) -> str:
    return str(profile["text"]) if profile and profile.get("text") else ""
