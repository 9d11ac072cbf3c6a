"""The loop: every search asks, judges and asks again until its iterations or the run's budget are used up.

The steps of an iteration are saved one by one; a run that was cut off goes on after the last saved step.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import anyio

from specgen_engine.agent.base import (
    AgentError,
    Attempt,
    Budget,
    Spent,
    best_of,
    exhausted,
    spent_by,
)  # fmt: skip
from specgen_engine.agent.endpoint import Endpoint
from specgen_engine.agent.history import History
from specgen_engine.agent.judging import Judge, judgement_in
from specgen_engine.agent.prompts import messages_for
from specgen_engine.controller.answers import extract_candidate
from specgen_engine.evaluation.base import Task


@dataclass(frozen=True, slots=True)
class Update:
    """Something to show: what a search is doing, and the attempt when one has ended."""

    search: int
    iteration: int
    doing: str
    details: dict[str, Any]
    attempt: Attempt | None = None


class Run:
    """One run over its history. on_update: hears what is worth showing; on_attempt: called after each saved verdict."""

    def __init__(
        self, task: Task, budget: Budget, searches: int, endpoint: Endpoint, judge: Judge, history: History,
        on_update: Callable[[Update], None], on_attempt: Callable[[], None],
    ) -> None:  # fmt: skip
        self.task, self.budget, self.searches = task, budget, searches
        self.endpoint, self.judge, self.history = endpoint, judge, history
        self.on_update, self.on_attempt = on_update, on_attempt
        self.attempts: dict[tuple[int, int], Attempt] = {(a.search, a.iteration): a for a in history.attempts()}
        self.ended_by = ""
        self._fault: AgentError | None = None

    def in_order(self) -> list[Attempt]:
        return [self.attempts[key] for key in sorted(self.attempts)]

    def spent(self) -> Spent:
        return spent_by(self.attempts.values(), self.history.now())

    async def run(self) -> str:
        """Returns what ended it. Raises AgentError when the endpoint or the evaluation failed; what was saved stays."""
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                for search in range(1, self.searches + 1):
                    group.start_soon(self._search, search, scope)
                group.start_soon(self._watch_clock, group.cancel_scope)
        if self._fault is not None:
            raise self._fault
        return self.ended_by or "all iterations done"

    async def _watch_clock(self, scope: anyio.CancelScope) -> None:
        """Ends the run, in the middle of a generation too, when its minutes are over; itself when all is done."""
        while not self._all_done():
            await anyio.sleep(0.2)
            if self.budget.minutes is not None and self.history.now() >= self.budget.minutes * 60:
                self.ended_by = exhausted(self.budget, self.spent()) or ""
                scope.cancel()

    def _all_done(self) -> bool:
        wanted = range(1, self.budget.iterations + 1)
        return bool(self.ended_by) or all(
            (one := self.attempts.get((search, number))) is not None and one.done
            for search in range(1, self.searches + 1)
            for number in wanted
        )

    async def _search(self, search: int, scope: anyio.CancelScope) -> None:
        try:
            for iteration in range(1, self.budget.iterations + 1):
                saved = self.attempts.get((search, iteration))
                if saved is not None and saved.done:
                    continue
                if over := exhausted(self.budget, self.spent()):
                    self.ended_by = over
                    return
                attempt = saved or await self._generate(search, iteration)
                await self._judge(attempt)
        except AgentError as error:
            self._fault = error
            scope.cancel()

    async def _generate(self, search: int, iteration: int) -> Attempt:
        def show(details: dict[str, Any]) -> None:
            self.on_update(Update(search, iteration, "generating", details))

        show({})
        started = self.history.now()
        done = [one for one in self.in_order() if one.done]
        messages = messages_for(self.task.source, self.judge.device, done, search)
        rid = f"optimize-{uuid.uuid4().hex[:12]}-{search}-{iteration}"
        generation = await self.endpoint.generate(messages, self.task, rid, iteration, show)
        attempt = Attempt(
            search, iteration, generation, extract_candidate(generation.answer), started, self.history.now()
        )
        self._save(attempt)
        return attempt

    async def _judge(self, attempt: Attempt) -> None:
        self.on_update(Update(attempt.search, attempt.iteration, "evaluating", {}))
        judgement = None
        if attempt.source is not None:
            judgement = self._known(attempt.source) or judgement_in(attempt.generation.search, attempt.source)
            if judgement is None:
                judgement = await self.judge.judge(attempt.source, f"search-{attempt.search}")
        attempt = replace(attempt, judgement=judgement, ended_s=self.history.now())
        self._save(attempt)
        self.on_update(Update(attempt.search, attempt.iteration, "done", {}, attempt))
        self.on_attempt()

    def _known(self, source: str) -> Any:
        """A candidate that an earlier iteration wrote too is not judged again."""
        for one in self.in_order():
            if one.done and one.source == source:
                return one.judgement
        return None

    def _save(self, attempt: Attempt) -> None:
        self.history.save(attempt)
        self.attempts[attempt.search, attempt.iteration] = attempt

    def best(self) -> Attempt | None:
        return best_of(self.attempts.values())
