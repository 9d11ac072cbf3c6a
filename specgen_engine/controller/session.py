"""A Session drives one base request: it forks, evaluates, decides and grafts.

One task owns all state and reads one queue of events, so nothing here needs a lock. States:

    reasoning -> answering -> competing -> ended        the base answers by itself
    reasoning -> ended                                  the criterion is met; the reasoning is ended and grafted
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import AsyncIterator
from typing import Any

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.controller.background import Background
from specgen_engine.controller.base_request import BaseRequest
from specgen_engine.controller.client import Client
from specgen_engine.controller.competition import Competition
from specgen_engine.controller.engine import Engine, Output
from specgen_engine.controller.events import (
    BaseFailed,
    BaseOutput,
    ForkBudget,
    ForkDone,
    GraceOver,
    Script,
    Sent,
    SessionOptions,
    Source,
    State,
    TaskChecked,
    VerdictIn,
)
from specgen_engine.controller.forking import Forks
from specgen_engine.controller.grace import Grace, own_grace_s
from specgen_engine.controller.graft import graft
from specgen_engine.controller.learning import Learner
from specgen_engine.controller.notes import Notes, Publish, ignore
from specgen_engine.controller.opening import opened_record, opening
from specgen_engine.controller.profiling import Profiling
from specgen_engine.controller.report import CandidateRecord, ForkRecord, summary_of
from specgen_engine.controller.request import Plan
from specgen_engine.controller.termination import Decision, Progress
from specgen_engine.controller.thinking import fork_suffix
from specgen_engine.controller.triggers import name_of
from specgen_engine.errors import RequestError
from specgen_engine.evaluation.base import Job, Pool, Status, Verdict
from specgen_engine.pools.policy import late_s
from specgen_engine.protocol import EndSearch, ForkPoint, ForkPointDone, TriggerFired, forks_of

logger = logging.getLogger(__name__)
DISCONNECT_POLL_S = 1.0
CLEAN_UP_S = 10.0


class Session:
    """See the module. outputs() yields what the client gets; close() may be called at any time, more than once."""

    def __init__(
        self, rid: str, plan: Plan, options: SessionOptions, engine: Engine, pool: Pool, budget: ForkBudget,
        script: Script | None = None, publish: Publish = ignore, learner: Learner | None = None,
    ) -> None:  # fmt: skip
        self.rid, self.plan, self.options = rid, plan, options
        self.engine, self.pool, self.budget, self.script = engine, pool, budget, script
        self.state = State.PREPARING
        self.sent = Sent()
        self.record = opened_record(rid, plan, options, script)
        self._start = time.monotonic()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._client = Client(plan.named)
        self._base = BaseRequest(options.style, options.opened, engine.encode)
        self._checked = False
        self._background = Background()
        self._competition = Competition(plan.task, plan.termination, pool, self.record, self._now)
        self._notes = Notes(self.record, publish, self._now)
        self._profiling = Profiling(options.profile, plan.task, pool, self.record, self._now, self._notes.candidate)
        self._forks = Forks(
            plan, options, engine, pool, budget, script, self.record, self._notes, learner or Learner(""), self._now,
            self._background.spawn, self._events.put_nowait,
        )  # fmt: skip
        self._main: asyncio.Task[None] | None = None
        self._grace = Grace(lambda: self._events.put_nowait(GraceOver()))

    # ---- the client's side

    async def outputs(self) -> AsyncIterator[Output]:
        """Outputs for the client: every step when streaming, else one. Raises what the base request raised."""
        self._main = asyncio.create_task(self._run(), name=f"specgen-{self.rid}")
        async for output in self._client.outputs():
            yield output

    def notify(self, message: TriggerFired | ForkPointDone) -> None:
        """A message from the scheduler."""
        self._events.put_nowait(message)

    def ask_for_fork(self) -> int:
        """A text-level trigger: fork at what the base has said so far. Returns the length asked for, in tokens.

        Raises ValueError when the base does not reason any more.
        """
        if self.state is not State.REASONING or not self._base.tokens:
            raise ValueError(f"search {self.rid} is {self.state.value}: only a running reasoning can be forked")
        length = self._known()
        self.engine.send(ForkPoint(rid=self.rid, length=length))
        return length

    def seconds(self) -> float:
        """Since the search began."""
        return self._now()

    def output_tokens(self) -> int:
        """Of the base so far."""
        return self._base.tokens

    def close(self) -> asyncio.Task[None] | None:
        """The client is gone or has its answer: cancel what still runs. Returns the task that cleans up, if any."""
        if self._main is not None and self.state is not State.ENDED:
            self._main.cancel()
        return self._main

    # ---- the loop

    async def _run(self) -> None:
        try:
            self._open()
            while self.state is not State.ENDED:
                try:
                    event = await asyncio.wait_for(self._events.get(), DISCONNECT_POLL_S)
                except TimeoutError:
                    if await self.engine.client_gone():
                        raise ValueError(
                            f"Request is disconnected from the client side. Abort request {self.rid}"
                        ) from None
                    continue
                self._handle(event)
        except asyncio.CancelledError:
            self._end("cancelled", "the client went away")
        except Exception as error:
            self._end("error" if not isinstance(error, RequestError) else "cancelled", str(error))
            self._client.fail(error)
        finally:
            self._client.end()
            await self._clean_up()

    def _open(self) -> None:
        for message in opening(self.rid, self.plan, self.options, self.script):
            self.engine.send(message)
        self.state = State.REASONING
        self.record.state = self.state.value
        self._notes.started()
        self._background.spawn(self._check_task())
        self._background.spawn(self._pump_base())

    def _handle(self, event: Any) -> None:
        match event:
            case BaseOutput(output):
                self._on_base(output)
            case TriggerFired():
                self._forks.await_tokens(event)
                self._fork_where_due()
            case ForkPointDone(asked=asked, inserted=inserted):
                self._forks.await_asked(asked, inserted)
                self._fork_where_due()
            case ForkDone(record, output, error):
                self._on_fork(record, output, error)
            case VerdictIn(record, verdict):
                self._on_verdict(record, verdict)
            case TaskChecked(problem):
                self._on_task(problem)
            case GraceOver():
                self._on_grace_over()
            case BaseFailed(error):
                raise error
        self.record.state = self.state.value

    # ---- base

    async def _pump_base(self) -> None:
        try:
            async for output in self.engine.generate_base():
                self._events.put_nowait(BaseOutput(output))
        except Exception as error:
            self._events.put_nowait(BaseFailed(error))

    async def _check_task(self) -> None:
        self._events.put_nowait(TaskChecked(await self.pool.check_task(self.plan.task)))

    def _on_task(self, problem: str | None) -> None:
        if problem and self.plan.named:
            raise RequestError("task", problem)
        if problem:
            self.record.warning = f"task not used: {problem}"
            logger.warning("specgen %s: task found in the prompt not used: %s", self.rid, problem)
        self._checked = True
        self._client.release()
        if self.state is State.COMPETING:
            self._conclude_when_idle()
        else:
            self._decide()

    def _on_base(self, output: Output) -> None:
        finish = self._base.take(output)
        self._notes.progress(self._base.tokens, output.text, self.state.value)
        if finish is not None:
            return self._on_base_end(output, finish)
        if self.state is State.REASONING and self._base.has_closed_thinking:
            self.state = State.ANSWERING
            self._forks.reasoned(self._base.tokens)
            self.record.reasoning_s = self._now()
            if self.options.streaming:
                self._end_competition()
        self._fork_where_due()
        if self.options.streaming:
            self._client.deliver(output)
        if self._competition.watches_progress:
            self._decide()

    def _on_base_end(self, output: Output, finish: dict[str, Any]) -> None:
        if finish.get("type") == "abort":
            self._deliver_last(output, "cancelled", str(finish.get("message") or "aborted"))
            return
        self.record.reasoning_s = self.record.reasoning_s or self._now()
        if self.state is State.REASONING and self._base.has_closed_thinking:
            self._forks.reasoned(self._base.tokens)
        answer = self._base.answer()
        source = extract_candidate(answer if answer is not None else output.text)
        self._forks.stop()
        if self.options.streaming:
            self._end_competition()
            self._client.deliver(output)
        if source is not None and (self.plan.named or not self.options.streaming):
            self._submit(source, "base", None, "final" if self.script is not None else None)
        self.state = State.COMPETING
        self._await_late()
        self._conclude_when_idle()

    def _await_late(self) -> None:
        """Candidates without a verdict, for as long as the policy leaves them."""
        own = self._competition.own
        right = own is not None and own.status is Status.CORRECT
        self._grace.start(late_s(self.options.grace_s, self._grace.waited(), self._now(), own_right=right))

    def _on_grace_over(self) -> None:
        """Others are given up; the base's own verdict, which says what its answer is worth, gets more time."""
        if self._grace.times > 1 or not self._competition.awaits_own():
            self._conclude()
            return
        self._competition.cancel(keep_own=True)
        self._grace.start(own_grace_s(self.options.grace_s, replaceable=self._winner() is not None))

    def _conclude_when_idle(self) -> None:
        if not self._competition.jobs and self._checked:
            self._conclude()

    def _conclude(self) -> None:
        """The base has answered by itself: the best correct candidate wins, unless its answer was streamed already."""
        if self.state is not State.COMPETING:
            return
        winner, own = self._winner(), self._competition.own
        if winner is not None:
            reason = f"better than the base's own answer, {winner.speedup:.3g}x"
            self._accept(Decision(winner.hash, reason), "reasoning")
            return
        if own is not None and own.status is Status.CORRECT:
            self.record.accepted = summary_of(own)
        self._deliver_last(
            None if self.options.streaming else self._base.output, "reasoning", "the base answered by itself"
        )

    def _winner(self) -> CandidateRecord | None:
        """The candidate that would replace the base's own answer as things stand."""
        leader = self._competition.leader()
        beaten = leader is not None and not self.options.streaming and self._competition.beats_own_answer(leader)
        return leader if beaten else None

    def _deliver_last(self, output: Output | None, ended_by: str, reason: str) -> None:
        self._checked = True
        self._client.release()
        self._end(ended_by, reason)
        if output is not None:
            self._client.deliver(output)

    # ---- forks

    def _fork_where_due(self) -> None:
        for message in self._forks.due(self._known()):
            if self.state is State.REASONING and not self.record.warning:
                self._fork(message)

    def _fork(self, message: TriggerFired) -> None:
        if name_of(message.trigger) == "draft":
            if (source := self._forks.harvest(message, self._base.output)) is not None:
                self._submit(source, "draft", None)
        else:
            self._forks.make(message, self._base.output, self._competition.best_speedup())

    def _known(self) -> int:
        """Tokens of the prompt and of the base so far."""
        return len(self.options.prompt_ids) + self._base.tokens

    def _progress(self) -> Progress:
        reasoned = self._base.tokens
        return Progress(self._now(), reasoned, reasoned + self.record.fork_tokens, self.record.evaluation_s)

    def _on_fork(self, record: ForkRecord, output: Output | None, error: str) -> None:
        source = self._forks.finish(record, output, error)
        if output is not None and source is not None:
            self._submit(source, "fork", record, output.meta.get("specgen_recorded"))

    def _end_competition(self) -> None:
        """What was streamed cannot be replaced: forks and their evaluations are of no use any more."""
        self._forks.stop()
        self._competition.cancel()

    # ---- candidates

    def _submit(self, source: str, origin: Source, fork: ForkRecord | None, recorded: str | None = None) -> None:
        if self.state is State.ENDED or self.record.warning:
            return
        at_token = fork.at_token if fork else self._base.tokens
        record, job = self._competition.enter(source, origin, fork.n if fork else None, recorded, at_token)
        self._notes.candidate(record)
        if fork is not None:
            self._forks.entered(fork, source, record.hash, fresh=job is not None)
            if job is None:
                self._forks.learn(fork.n, 0.0)
        if job is not None:
            self._background.spawn(self._await_verdict(record, job))
            self._background.spawn(self._notes.follow(record, job))

    async def _await_verdict(self, record: CandidateRecord, job: Job) -> None:
        self._events.put_nowait(VerdictIn(record, await job.verdict()))

    def _on_verdict(self, record: CandidateRecord, verdict: Verdict) -> None:
        self._competition.judge(record, verdict)
        self._notes.candidate(record)
        self._profiling.ask(record, self._competition.texts[record.hash])
        if record.forks and verdict.status is not Status.CANCELLED:
            self._forks.learn(record.forks[0], verdict.speedup or 0.0)
        if self.plan.feedback and verdict.digest:
            self._forks.tell(verdict.digest)
        if self.state is State.COMPETING:
            if record is self._competition.own:
                self._await_late()
            self._conclude_when_idle()
        else:
            self._decide()

    def _decide(self) -> None:
        replaceable = self.state is State.REASONING or (self.state is State.ANSWERING and not self.options.streaming)
        if replaceable and self._checked and (decision := self._competition.decide(self._progress())):
            self._accept(decision, "criterion")

    def _accept(self, decision: Decision, ended_by: str) -> None:
        """End the reasoning: the client gets what was reasoned so far, closed, and the accepted candidate's answer."""
        self.record.accepted = summary_of(self._competition.candidates[decision.hash])
        answer = self._forks.answer(decision.hash)
        close_ids = self.engine.encode(fork_suffix(self.options.style))
        final = graft(self._base.drop_answer(), answer, close_ids, self.options.style)
        self.record.answer_tokens = len(close_ids) + len(answer.ids)
        if not self._base.done:
            self.engine.abort(self.rid)
        self._deliver_last(final, ended_by, decision.reason)

    # ---- the end

    def _end(self, ended_by: str, reason: str) -> None:
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        record = self.record
        record.state, record.ended_by, record.reason = self.state.value, ended_by, reason
        record.wall_s = self._now()
        record.reasoning_s = record.reasoning_s or record.wall_s
        answer_tokens = self._base.answer_tokens()
        record.reasoning_tokens = max(0, self._base.tokens - answer_tokens)
        if ended_by == "reasoning" and not record.answer_tokens:
            record.answer_tokens = answer_tokens
        record.ids.base = array("i", self._base.output.ids)
        for fork in record.forks:
            if fork.state == "running":
                fork.state = "cancelled"
        self._competition.close()
        self._profiling.keep(record.accepted["hash"] if record.accepted else None)
        self._notes.ended()

    async def _clean_up(self) -> None:
        """Leave nothing behind: no request in the engine, no job in the pool, no state in the schedulers."""
        self._grace.stop()
        if not self._base.done:
            self.engine.abort(self.rid)
        self._forks.stop_all()
        await self._background.close(CLEAN_UP_S)
        self.engine.send(EndSearch(rid=self.rid, scripts=forks_of(self.rid)))
        await self._profiling.close()

    def _now(self) -> float:
        return round(time.monotonic() - self._start, 4)
