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
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from specgen_engine.controller.answers import extract_candidate
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
from specgen_engine.controller.forking import ASKED, Forks
from specgen_engine.controller.graft import graft
from specgen_engine.controller.learning import Learner
from specgen_engine.controller.notes import Notes, Publish, ignore
from specgen_engine.controller.report import CandidateRecord, ForkRecord, SearchRecord, summary_of
from specgen_engine.controller.request import Plan
from specgen_engine.controller.termination import Decision, Progress
from specgen_engine.controller.thinking import Phase, ReasoningPhase, fork_suffix, split_thinking
from specgen_engine.controller.triggers import name_of
from specgen_engine.errors import RequestError
from specgen_engine.evaluation.base import Job, Pool, Status, Verdict
from specgen_engine.protocol import (
    EndSearch,
    ForkPoint,
    ForkPointDone,
    ReplayScript,
    TriggerFired,
    WatchSearch,
    forks_of,
)

logger = logging.getLogger(__name__)
DISCONNECT_POLL_S = 1.0
CLEAN_UP_S = 10.0
# Graces more for the base's own verdict; by default 300 s, the limits of one evaluation together.
OWN_GRACES = 10
LATE_SHARE = 0.025
"""Of a search's time so far: what candidates without a verdict get once the base's own answer is known to be right. As
much as the adaptive trigger lets forks cost; on two H200 a search had waited 7.7 s of 90 for one that was no better."""


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
        self.record = SearchRecord(
            id=rid, task=plan.task.name, task_hash=plan.task.hash, trigger=plan.trigger, termination=plan.termination,
            created=time.time(), named=plan.named, prompt_tokens=len(options.prompt_ids),
        )  # fmt: skip
        if script is not None:
            self.record.trace, self.record.iteration = script.trace, script.number
            self.record.recorded_reasoning_tokens = script.reasoning_tokens
        self._start = time.monotonic()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._client: asyncio.Queue[Output | BaseException | None] = asyncio.Queue()
        self._phase = ReasoningPhase(options.style, options.opened)
        self._phase_seen = 0
        self._phase_state = self._phase.start()
        self._base = Output([], "", {})
        self._base_done = False
        self._checked = False
        self._held: list[Output] = []
        self._triggers: list[TriggerFired] = []
        self._competition = Competition(plan.task, plan.termination, pool, self.record, self._now)
        self._notes = Notes(self.record, publish, self._now)
        self._forks = Forks(
            plan, options, engine, pool, budget, script, self.record, self._notes, learner or Learner(""), self._now,
            self._spawn, self._events.put_nowait,
        )  # fmt: skip
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._graces = 0

    # ---- the client's side

    async def outputs(self) -> AsyncIterator[Output]:
        """Outputs for the client: every step when streaming, else one. Raises what the base request raised."""
        self._main = asyncio.create_task(self._run(), name=f"specgen-{self.rid}")
        while (item := await self._client.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def notify(self, message: TriggerFired | ForkPointDone) -> None:
        """A message from the scheduler."""
        self._events.put_nowait(message)

    def ask_for_fork(self) -> int:
        """A text-level trigger: fork at what the base has said so far. Returns the length asked for, in tokens.

        Raises ValueError when the base does not reason any more.
        """
        if self.state is not State.REASONING or not self._base.ids:
            raise ValueError(f"search {self.rid} is {self.state.value}: only a running reasoning can be forked")
        length = len(self.options.prompt_ids) + len(self._base.ids)
        self.engine.send(ForkPoint(rid=self.rid, length=length))
        return length

    def seconds(self) -> float:
        """Since the search began."""
        return self._now()

    def output_tokens(self) -> int:
        """Of the base so far."""
        return len(self._base.ids)

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
            self._client.put_nowait(error)
        finally:
            self._client.put_nowait(None)
            await self._clean_up()

    def _open(self) -> None:
        plan, style = self.plan, self.options.style
        self.engine.send(
            WatchSearch(
                rid=self.rid,
                trigger=plan.trigger,
                open_mark=style.open,
                close_mark=style.close,
                opened=self.options.opened,
            )
        )
        if self.script is not None:
            self.engine.send(
                ReplayScript(
                    rid=self.rid,
                    prompt_tokens=len(self.options.prompt_ids),
                    ids=self.script.base_ids(self.options.opened),
                )
            )
        self.state = State.REASONING
        self.record.state = self.state.value
        self._notes.started()
        self._spawn(self._check_task())
        self._spawn(self._pump_base())

    def _handle(self, event: Any) -> None:
        match event:
            case BaseOutput(output):
                self._on_base(output)
            case TriggerFired():
                self._triggers.append(event)
                self._fork_where_due()
            case ForkPointDone(asked=asked, inserted=inserted):
                reasoning = asked - len(self.options.prompt_ids)
                fired = TriggerFired(
                    rid=self.rid, trigger=ASKED, length=asked, reasoning_tokens=reasoning, inserted=inserted
                )
                self._triggers.append(fired)
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
        for output in self._held:
            self._deliver(output)
        self._held.clear()
        if self.state is State.COMPETING:
            self._conclude_when_idle()
        else:
            self._decide()

    def _on_base(self, output: Output) -> None:
        self._base = output
        self._advance_phase()
        self._notes.progress(len(output.ids), output.text, self.state.value)
        finish = output.finish
        if finish is not None:
            self._base_done = True
            return self._on_base_end(output, finish)
        if self.state is State.REASONING and self._phase_state.phase is Phase.ANSWER and self.options.style.close:
            self.state = State.ANSWERING
            self._forks.reasoned(self._reasoned())
            self.record.reasoning_s = self._now()
            if self.options.streaming:
                self._end_competition()
        self._fork_where_due()
        if self.options.streaming:
            self._deliver(output)
        if self._competition.watches_progress:
            self._decide()

    def _advance_phase(self) -> None:
        """Text since the last output in one piece: the machine takes pieces of any length."""
        piece = self._base.text[self._phase_seen :]
        self._phase_seen = len(self._base.text)
        if piece:
            self._phase_state = self._phase.step(self._phase_state, piece)

    def _deliver(self, output: Output) -> None:
        """A request that named a task hears nothing before its task is known to work: an error must still be a 400."""
        if self._checked or not self.plan.named:
            self._client.put_nowait(output)
        else:
            self._held.append(output)

    def _on_base_end(self, output: Output, finish: dict[str, Any]) -> None:
        if finish.get("type") == "abort":
            self._deliver_last(output, "cancelled", str(finish.get("message") or "aborted"))
            return
        self.record.reasoning_s = self.record.reasoning_s or self._now()
        if self.state is State.REASONING and self._phase_state.phase is Phase.ANSWER and self.options.style.close:
            self._forks.reasoned(self._reasoned())
        _, answer = split_thinking(self.options.style, self.options.opened, output.text)
        source = extract_candidate(answer if answer is not None else output.text)
        self._forks.stop()
        if self.options.streaming:
            self._end_competition()
            self._deliver(output)
        if source is not None and (self.plan.named or not self.options.streaming):
            self._submit(source, "base", None, "final" if self.script is not None else None)
        self.state = State.COMPETING
        self._start_grace(self.options.grace_s)
        self._hurry_once_right()
        self._conclude_when_idle()

    def _start_grace(self, seconds: float) -> None:
        if self._grace is not None:
            self._grace.cancel()
        self._graces += 1
        self._grace = asyncio.get_running_loop().call_later(seconds, self._events.put_nowait, GraceOver())

    def _hurry_once_right(self) -> None:
        """The client could have its answer now: what is late is awaited only for a small share of the time so far."""
        own = self._competition.own
        if own is not None and own.status is Status.CORRECT:
            self._start_grace(min(self.options.grace_s, LATE_SHARE * self._now()))

    def _on_grace_over(self) -> None:
        """Other candidates are given up; the base's own verdict, which says what its answer is worth, gets more time,
        unless a kernel that is known to be faster replaces the answer."""
        if self._graces > 1 or self._winner() is not None or not self._competition.awaits_own():
            self._conclude()
            return
        self._competition.cancel(keep_own=True)
        self._start_grace(OWN_GRACES * self.options.grace_s)

    def _conclude_when_idle(self) -> None:
        if not self._competition.jobs and self._checked:
            self._conclude()

    def _conclude(self) -> None:
        """The base has answered by itself: the best correct candidate wins, unless its answer was streamed already."""
        if self.state is not State.COMPETING:
            return
        winner, own = self._winner(), self._competition.own
        if winner is not None:
            self._accept(
                Decision(winner.hash, f"better than the base's own answer, {winner.speedup:.3g}x"), "reasoning"
            )
            return
        if own is not None and own.status is Status.CORRECT:
            self.record.accepted = summary_of(own)
        self._checked = True
        self._deliver_last(None if self.options.streaming else self._base, "reasoning", "the base answered by itself")

    def _winner(self) -> CandidateRecord | None:
        """The candidate that would replace the base's own answer as things stand."""
        leader = self._competition.leader()
        beaten = leader is not None and not self.options.streaming and self._competition.beats_own_answer(leader)
        return leader if beaten else None

    def _deliver_last(self, output: Output | None, ended_by: str, reason: str) -> None:
        self._checked = True
        for held in self._held:
            self._client.put_nowait(held)
        self._held.clear()
        self._end(ended_by, reason)
        if output is not None:
            self._client.put_nowait(output)

    # ---- forks

    def _fork_where_due(self) -> None:
        """A trigger message overtakes the tokens it speaks of; fork once they are here."""
        known = len(self.options.prompt_ids) + len(self._base.ids)
        due = [message for message in self._triggers if message.length <= known]
        self._triggers = [message for message in self._triggers if message.length > known]
        for message in due:
            if self.state is State.REASONING and not self.record.warning:
                self._fork(message)

    def _fork(self, message: TriggerFired) -> None:
        if name_of(message.trigger) == "draft":
            if (source := self._forks.harvest(message, self._base)) is not None:
                self._submit(source, "draft", None)
        else:
            self._forks.make(message, self._base, self._competition.best_speedup())

    def _reasoned(self) -> int:
        return len(self._base.ids)

    def _progress(self) -> Progress:
        return Progress(
            self._now(), self._reasoned(), self._reasoned() + self.record.fork_tokens, self.record.evaluation_s
        )

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
        at_token = fork.at_token if fork else self._reasoned()
        record, job = self._competition.enter(source, origin, fork.n if fork else None, recorded, at_token)
        self._notes.candidate(record)
        if fork is not None:
            self._forks.same_as(fork, source, record.hash)
            if job is None:
                self._forks.learn(fork.n, 0.0)
        if job is not None:
            self._spawn(self._await_verdict(record, job))
            self._spawn(self._follow_stages(record, job))

    async def _await_verdict(self, record: CandidateRecord, job: Job) -> None:
        self._events.put_nowait(VerdictIn(record, await job.verdict()))

    async def _follow_stages(self, record: CandidateRecord, job: Job) -> None:
        async for stage in job.events():
            if record.status is None:
                self._notes.stage(record.hash, stage)

    def _on_verdict(self, record: CandidateRecord, verdict: Verdict) -> None:
        self._competition.judge(record, verdict)
        self._notes.candidate(record)
        if record.forks and verdict.status is not Status.CANCELLED:
            self._forks.learn(record.forks[0], verdict.speedup or 0.0)
        if self.plan.feedback and verdict.digest:
            self._forks.tell(verdict.digest)
        if self.state is State.COMPETING:
            if record is self._competition.own:
                self._hurry_once_right()
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
        _, own_answer = split_thinking(self.options.style, self.options.opened, self._base.text)
        if own_answer is not None:
            self._base = self._without_answer(own_answer)
        final = graft(self._base, answer, close_ids, self.options.style)
        self.record.answer_tokens = len(close_ids) + len(answer.ids)
        if not self._base_done:
            self.engine.abort(self.rid)
        self._deliver_last(final, ended_by, decision.reason)

    def _without_answer(self, answer: str) -> Output:
        """The base cut off before the closing mark: an unstreamed answer that lost, not part of what is returned."""
        style, text = self.options.style, self._base.text
        kept = text[: len(text) - len(answer) - len(style.close)].rstrip("\n")
        dropped = len(self.engine.encode(text[len(kept) :]))
        return Output(self._base.ids[: len(self._base.ids) - dropped], kept, self._base.meta)

    # ---- the end

    def _end(self, ended_by: str, reason: str) -> None:
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        record = self.record
        record.state, record.ended_by, record.reason = self.state.value, ended_by, reason
        record.wall_s = self._now()
        record.reasoning_s = record.reasoning_s or record.wall_s
        self._count_tokens()
        record.ids.base = array("i", self._base.ids)
        for fork in record.forks:
            if fork.state == "running":
                fork.state = "cancelled"
        self._competition.close()
        self._notes.ended()

    def _count_tokens(self) -> None:
        """Reasoning and answer tokens of the base itself, by re-encoding the answer's text alone."""
        _, answer = split_thinking(self.options.style, self.options.opened, self._base.text)
        answer_tokens = len(self.engine.encode(answer)) if answer else 0
        self.record.reasoning_tokens = max(0, len(self._base.ids) - answer_tokens)
        if self.record.ended_by == "reasoning" and not self.record.answer_tokens:
            self.record.answer_tokens = answer_tokens

    async def _clean_up(self) -> None:
        """Leave nothing behind: no request in the engine, no job in the pool, no state in the schedulers."""
        if self._grace is not None:
            self._grace.cancel()
        self._stop_engine()
        waiting = [task for task in self._tasks if not task.done()]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=CLEAN_UP_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self.engine.send(EndSearch(rid=self.rid, scripts=forks_of(self.rid)))

    def _stop_engine(self) -> None:
        if not self._base_done:
            self.engine.abort(self.rid)
        self._forks.stop_all()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _now(self) -> float:
        return round(time.monotonic() - self._start, 4)
