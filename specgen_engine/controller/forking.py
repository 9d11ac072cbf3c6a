"""The forks of one search: made at fork points, run, cut, counted; and drafts harvested in their place."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, runtime_checkable

from specgen_engine.controller.adaptive import View
from specgen_engine.controller.answers import drafted_modules, extract_candidate, feedback_of, goes_on_reasoning
from specgen_engine.controller.engine import Engine, Output
from specgen_engine.controller.events import ForkBudget, ForkDone, Script, SessionOptions
from specgen_engine.controller.learning import TRIGGER as ADAPTIVE
from specgen_engine.controller.learning import Learner
from specgen_engine.controller.notes import Notes
from specgen_engine.controller.repeats import worth_ending
from specgen_engine.controller.report import ForkRecord, LateFork, SearchRecord
from specgen_engine.controller.request import Plan
from specgen_engine.controller.sayings import Sayings
from specgen_engine.controller.thinking import fork_suffix
from specgen_engine.controller.triggers import name_of
from specgen_engine.evaluation.base import Candidate, Pool
from specgen_engine.pools.policy import Admission
from specgen_engine.protocol import ReplayScript, TriggerFired, fork_rid

logger = logging.getLogger(__name__)
LOOK_TOKENS = 32
"""How often a fork's text is looked at for whether it is an answer at all."""
REASONED_ON = "reasoned on"
REPEATS = "repeats: fork "
"""and its number: likely the same answer as that fork's, and ended before it was whole."""
ABORTED = ("aborted", REASONED_ON)
ASKED = "asked"
"""Trigger of a fork that somebody asked for by name: it is made whenever it comes."""


@runtime_checkable
class Admits(Protocol):
    """A pool that can say whether a fork would be judged in time (pools/policy.admit)."""

    def admission(self, wanted: int, remaining_s: float, **fork: float) -> Admission: ...


class Forks:
    """Belongs to one Session, whose event loop it shares. post: puts a ForkDone into the session's queue."""

    def __init__(
        self, plan: Plan, options: SessionOptions, engine: Engine, pool: Pool, budget: ForkBudget,
        script: Script | None, record: SearchRecord, notes: Notes, learner: Learner, now: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], None], post: Callable[[ForkDone], None],
    ) -> None:  # fmt: skip
        self.plan, self.options, self.engine, self.pool, self.budget = plan, options, engine, pool, budget
        self.script, self.record, self.notes, self.learner = script, record, notes, learner
        self._now, self._spawn, self._post = now, spawn, post
        self._suffix_ids = engine.encode(fork_suffix(options.style, plan.nudge))
        self._by_rid: dict[str, ForkRecord] = {}
        self._made_at: set[int] = set()
        self._awaited: list[TriggerFired] = []
        self._texts: dict[str, Output] = {}
        self._said = Sayings()
        self._views: dict[int, View] = {}
        self._last = 0
        self._feedback = ""

    def await_tokens(self, message: TriggerFired) -> None:
        """A trigger message overtakes the tokens it speaks of."""
        self._awaited.append(message)

    def await_asked(self, length: int, inserted: int) -> None:
        """The fork point that somebody asked for by name is made. length, inserted: tokens, the prompt's included."""
        reasoning = length - len(self.options.prompt_ids)
        self.await_tokens(
            TriggerFired(
                rid=self.record.id, trigger=ASKED, length=length, reasoning_tokens=reasoning, inserted=inserted
            )
        )

    def due(self, known: int) -> list[TriggerFired]:
        """Messages whose tokens are here now. known: tokens of the prompt and of the base so far."""
        due = [message for message in self._awaited if message.length <= known]
        self._awaited = [message for message in self._awaited if message.length > known]
        return due

    def make(self, message: TriggerFired, base: Output, best: float) -> None:
        """Fork the base where the trigger fired, unless the adaptive policy or a cap is against it.

        best: speed-up of the fastest correct candidate so far, 0 without one.
        """
        if message.length in self._made_at:
            return
        running = sum(record.state == "running" for record in self._by_rid.values())
        position = message.reasoning_tokens
        view = View(position - self._last, best, position, len(self.record.forks), self.record.fork_tokens, running)
        if name_of(message.trigger) == ADAPTIVE and not self._wanted(view):
            return
        if name_of(message.trigger) != ASKED and self._too_late(message):
            return
        if running >= self.options.per_search or not self.budget.take(self.record.id):
            self.record.forks_skipped += 1
            return
        self._made_at.add(message.length)
        prompt, number = self.options.prompt_ids, len(self.record.forks) + 1
        self._views[number], self._last = view, message.reasoning_tokens
        feedback = self.engine.encode(self._feedback) if self._feedback else []
        ids = [*prompt, *base.ids[: message.length - len(prompt)], *feedback, *self._suffix_ids]
        record = ForkRecord(
            n=number,
            trigger=message.trigger,
            at_token=message.reasoning_tokens,
            prompt_tokens=len(prompt),
            input_tokens=len(ids),
            started_s=self._now(),
            prefix_inserted=message.inserted,
            page_size=self.options.page_size,
        )
        rid = fork_rid(self.record.id, number)
        self._by_rid[rid] = record
        self.record.forks.append(record)
        self.record.ids.add_fork(ids)
        self.notes.fork(record)
        recorded = self._play(rid, message.reasoning_tokens, len(ids))
        self._spawn(self._run(rid, ids, record, recorded))

    def _wanted(self, view: View) -> bool:
        """Ask the adaptive policy, with the pool as it is now."""
        pool = self.pool.snapshot()
        waiting, evaluators = pool.get("queued"), pool.get("ready")
        return self.learner.wants(
            self.plan.task.name,
            view,
            waiting if isinstance(waiting, int) else 0,
            evaluators if isinstance(evaluators, int) else 1,
        )

    def _too_late(self, message: TriggerFired) -> bool:
        """Ask the pool whether feedback on a fork made now would come in time; an idle pool gets a first one."""
        position, seconds = message.reasoning_tokens, self._now()
        if not isinstance(self.pool, Admits) or position <= 0 or seconds <= 0:
            return False
        task, pace_s = self.plan.task.name, seconds / position
        left_s = self.learner.expected_left(task, position) * pace_s
        answer = min(self.learner.answer_tokens(task), self.plan.fork_tokens)
        advice = self.pool.admission(
            1, left_s, generate_s=answer * pace_s, coming=self.budget.in_flight, elapsed_s=seconds,
            grace_s=0.0 if self.options.streaming else self.options.grace_s,
        )  # fmt: skip
        if advice.forks or (advice.idle and not self.record.forks):
            return False
        feedback_s = round(advice.feedback_s, 3) if math.isfinite(advice.feedback_s) else None
        late = LateFork(seconds, position, message.trigger, round(left_s, 3), feedback_s, advice.reason)
        self.record.late_forks.append(late)
        self.notes.late(late)
        logger.info("specgen %s: no fork at token %d: %s", self.record.id, position, advice.reason)
        return True

    def reasoned(self, tokens: int) -> None:
        """The base's reasoning has ended by itself."""
        self.learner.observe_whole(self.plan.task.name, tokens)

    def _play(self, rid: str, at_token: int, input_tokens: int) -> str | None:
        if self.script is None:
            return None
        recorded, ids = self.script.fork_ids(at_token)
        self.engine.send(ReplayScript(rid=rid, prompt_tokens=input_tokens, ids=ids))
        return recorded

    async def _run(self, rid: str, ids: list[int], record: ForkRecord, recorded: str | None) -> None:
        options: dict[str, Any] = {"max_new_tokens": self.plan.fork_tokens}
        if self.plan.temperature is not None:
            options["temperature"] = self.plan.temperature
        output, error, looked_at = None, "", 0
        try:
            async for step in self.engine.generate_fork(rid, ids, options):
                output = step
                record.tokens = max(record.tokens, len(step.ids))  # an abort comes without ids
                record.prefix_reused = int(step.meta.get("cached_tokens", 0))
                record.replica = step.meta.get("dp_rank", record.replica)  # an abort comes without it
                self._said.hear(record.n, step.ids)
                if record.tokens >= looked_at + LOOK_TOKENS and record.state == "running":
                    looked_at = record.tokens
                    if (why := self._cut(record, step.text, recorded is not None)) is not None:
                        record.state = why
                        self.engine.abort(rid)
        except Exception as failure:
            error = str(failure)
        finally:
            self.budget.give_back(self.record.id)
        if output is not None and recorded is not None:
            output.meta["specgen_recorded"] = recorded
        self._post(ForkDone(record, output, error))

    def _cut(self, record: ForkRecord, text: str, recorded: bool) -> str | None:
        """Why a fork is not to go on: the state that it ends in. A recorded one is an answer whatever it looks like."""
        if not recorded and goes_on_reasoning(text):
            return REASONED_ON
        earlier = None if self.plan.end_repeats is None else self._repeated(record, self.plan.end_repeats)
        if earlier is None:
            return None
        self.learner.repeats, really = self.learner.repeats.chose()
        if not really:
            self._said.let_go(record.n)
            return None
        self._said.leave(record.n)
        return f"{REPEATS}{earlier}"

    def _repeated(self, record: ForkRecord, worth: float) -> int | None:
        """The earlier fork whose answer this one writes again, so likely that it is not worth while to go on."""
        earlier = self._said.followed(record.n)
        if earlier is None:
            return None
        whole = float(self._said.tokens(earlier))
        if self.record.forks[earlier - 1].finished_s is None:
            whole = max(whole, self.learner.answer_tokens(self.plan.task.name))
        left, spent = whole - record.tokens, self._last + self.record.fork_tokens
        evidence, candidates = self.learner.repeats, len(self.record.candidates)
        return earlier if worth_ending(evidence, worth, record.tokens, left, spent, candidates) else None

    def finish(self, record: ForkRecord, output: Output | None, error: str) -> str | None:
        """Write what became of a fork into its record; returns the candidate it wrote, if any."""
        record.finished_s = self._now()
        source = None if output is None else self._source_of(record, output)
        if output is None:
            record.state = f"failed: {error}" if error else "failed"
        if output is None or record.state in ABORTED:
            self._said.leave(record.n)
        if record.state.startswith(REPEATS):
            record.candidate = self.record.forks[int(record.state.removeprefix(REPEATS)) - 1].candidate
        if source is None:
            self.learn(record.n, 0.0)
        elif output is not None:
            record.candidate = Candidate(source).hash
            self._texts.setdefault(record.candidate, output)
        self.notes.fork(record)
        return source

    def _source_of(self, record: ForkRecord, output: Output) -> str | None:
        record.prefix_computed = record.input_tokens - record.prefix_reused
        self.record.ids.fork_outputs[record.n] = array("i", output.ids)
        finish = (output.finish or {}).get("type")
        if record.state == "running" or (record.state.startswith(REPEATS) and finish != "abort"):
            record.state = "aborted" if finish == "abort" else str(finish or "done")
        whole = record.state not in ABORTED and not record.state.startswith(REPEATS)
        return extract_candidate(output.text) if whole else None

    def harvest(self, message: TriggerFired, base: Output) -> str | None:
        """The module that the reasoning has just drafted whole: a candidate without a generation."""
        drafts = drafted_modules(base.text)
        if message.length in self._made_at or not drafts:
            return None
        self._made_at.add(message.length)
        source = drafts[-1][1]
        answer = f"```python\n{source.strip()}\n```\n"
        self._texts.setdefault(Candidate(source).hash, Output(self.engine.encode(answer), answer, {}))
        return source

    def entered(self, fork: ForkRecord, source: str, known: str, fresh: bool) -> None:
        """A fork's candidate is in the competition as `known`, perhaps a hash of one that differs in nothing that
        matters. fresh: it was not there before."""
        if (agreed := self._said.agreed(fork.n)) is not None:
            self.learner.repeats = self.learner.repeats.learnt(agreed, not fresh)
        own = Candidate(source).hash
        if own != known:
            self._texts.setdefault(known, self._texts[own])
            fork.candidate = known
        for follower in self.record.forks:
            if follower.state == f"{REPEATS}{fork.n}":
                follower.candidate = known

    def learn(self, fork: int, speedup: float) -> None:
        """Once a fork: what came of it; 0 when it gave no candidate, a known or a failing one."""
        if (view := self._views.pop(fork, None)) is not None:
            self.learner.observe(self.plan.task.name, view, speedup, self.record.forks[fork - 1].tokens)

    def tell(self, digest: str) -> None:
        """The error that the next fork is to hear of."""
        self._feedback = feedback_of(digest)

    def answer(self, candidate: str) -> Output:
        """The text that a fork or a draft gave with this candidate."""
        return self._texts[candidate]

    def stop(self) -> None:
        for rid, record in self._by_rid.items():
            if record.finished_s is None and record.state == "running":
                self.engine.abort(rid)

    def stop_all(self) -> None:
        """Those that were cut and have not ended yet, too."""
        for rid, record in self._by_rid.items():
            if record.finished_s is None:
                self.engine.abort(rid)
