"""The controller of one server: its pool, its live sessions, and the searches that have ended."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from specgen_engine.config import SpecGenConfig
from specgen_engine.controller.engine import Output, SGLangEngine
from specgen_engine.controller.events import SessionOptions
from specgen_engine.controller.learning import Learner
from specgen_engine.controller.ranks import Ranks
from specgen_engine.controller.report import SearchRecord
from specgen_engine.controller.request import Plan
from specgen_engine.controller.session import Session
from specgen_engine.controller.thinking import prompt_opens_thinking, style_of
from specgen_engine.controller.trust import prompt_tasks_refused
from specgen_engine.errors import RequestError
from specgen_engine.evaluation.base import Pool
from specgen_engine.observability.feed import Feed
from specgen_engine.observability.metrics import Metrics
from specgen_engine.observability.spans import span_book_of
from specgen_engine.protocol import ForkPointDone, TriggerFired
from specgen_engine.replay.book import ReplayBook

logger = logging.getLogger(__name__)


class Budget:
    """Forks in flight on this server; a search gets none when all are out."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken: Counter[str] = Counter()

    def take(self, search: str) -> bool:
        if self.taken.total() >= self.total:
            return False
        self.taken[search] += 1
        return True

    @property
    def in_flight(self) -> int:
        return self.taken.total()

    def give_back(self, search: str) -> None:
        self.taken[search] -= 1
        if not self.taken[search]:
            del self.taken[search]


class Controller:
    """One a TokenizerManager. `manager` is SGLang's; `make_pool` builds the evaluation pool at first use."""

    def __init__(
        self, manager: Any, settings: SpecGenConfig, make_pool: Callable[[SpecGenConfig, Any], Pool],
        metrics: Metrics | None = None,
    ) -> None:  # fmt: skip
        self.manager, self.settings = manager, settings
        server = manager.server_args
        template = getattr(manager.tokenizer, "chat_template", None)
        override = None if settings.thinking == "auto" else settings.thinking
        self.style = style_of(template if isinstance(template, str) else None, server.reasoning_parser, override)
        self.budget = Budget(settings.fork.total)
        self.ranks = Ranks(server.dp_size)
        self.learner = Learner(Path(server.model_path).name, settings.adaptive_state)
        self.sessions: dict[str, Session] = {}
        self.history: OrderedDict[str, SearchRecord] = OrderedDict()
        self.metrics = metrics or Metrics()
        self.feed = Feed()
        self._spans = span_book_of(manager)
        self.prompt_tasks_refused = prompt_tasks_refused(settings, server)
        self.reads_prompts = settings.tasks.source == "prompt" and not self.prompt_tasks_refused
        if settings.tasks.source == "prompt" and self.prompt_tasks_refused:
            logger.warning("specgen: --specgen-tasks prompt is not in force: %s", self.prompt_tasks_refused)
        self.book = ReplayBook.load(settings.replay, manager.tokenizer, self.style) if settings.replay else None
        self._make_pool = make_pool
        self._pool: Pool | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None

    def encode(self, text: str) -> list[int]:
        return list(self.manager.tokenizer.encode(text, add_special_tokens=False))

    def start(self) -> None:
        """Build and start the pool; called once the server's event loop runs."""
        if self._pool is None:
            self._pool = self._make_pool(self.settings, self.manager.server_args)
            self._starting = asyncio.get_running_loop().create_task(self._start_pool(self._pool))

    async def _start_pool(self, pool: Pool) -> None:
        """A pool that cannot start answers every job with the reason; the server goes on."""
        try:
            await pool.start()
        except Exception as error:
            logger.error("specgen: the evaluation pool did not start: %s", error)

    def pool(self) -> Pool:
        """The pool; jobs may be submitted while its workers still start."""
        self.start()
        assert self._pool is not None
        return self._pool

    async def search(
        self, generate: Callable[..., AsyncIterator[dict[str, Any]]], obj: Any, request: Any, plan: Plan, prompt: str
    ) -> AsyncIterator[dict[str, Any]]:
        """Serve one base request as a search; yields what generate_request would."""
        pool = self.pool()
        streaming, obj.stream = bool(obj.stream), True
        if obj.rid is None:
            obj.regenerate_rid()
        prompt_ids = obj.input_ids if obj.input_ids is not None else self.manager.tokenizer.encode(prompt)
        options = SessionOptions(
            style=self.style,
            opened=prompt_opens_thinking(self.style, prompt),
            streaming=streaming,
            per_search=self.settings.fork.per_search,
            grace_s=self.settings.grace_s,
            page_size=self.manager.server_args.page_size or 1,
            prompt_ids=list(prompt_ids),
            profile=self.settings.evaluation.profile,
        )
        try:
            script = self.book.recording(plan.task.hash, plan.iteration) if self.book else None
        except ValueError as error:
            raise RequestError("iteration", str(error)) from None
        if obj.routed_dp_rank is None:
            obj.routed_dp_rank = self.ranks.next(self._replicas())
        engine = SGLangEngine(self.manager, generate, obj, request)
        session = Session(obj.rid, plan, options, engine, pool, self.budget, script, self._publish, self.learner)
        session.record.replica = obj.routed_dp_rank
        self._open(session)
        try:
            async for output in session.outputs():
                yield self._shape(output, session, obj)
        finally:
            self._close(session)

    def _shape(self, output: Output, session: Session, obj: Any) -> dict[str, Any]:
        shaped: dict[str, Any] = {"text": output.text, "output_ids": output.ids, "meta_info": dict(output.meta)}
        if output.finish is not None and session.plan.named and not session.options.streaming:
            shaped["meta_info"]["specgen"] = session.record.to_dict()
        if session.options.streaming and self.manager.incremental_streaming_output:
            sent = session.sent
            shaped["text"], shaped["output_ids"] = output.text[sent.text :], output.ids[sent.ids :]
        session.sent = session.sent._replace(text=len(output.text), ids=len(output.ids))
        return shaped

    def _publish(self, kind: str, data: dict[str, Any]) -> None:
        self.feed.publish(kind, data)
        if self._spans is not None:
            self._spans.on_event(kind, data)
        if kind in ("candidate", "stage") and self._pool is not None:
            self.metrics.observe_pool(self._pool.snapshot())

    def _open(self, session: Session) -> None:
        self.sessions[session.rid] = session
        self.metrics.searches_running.set(len(self.sessions))
        self.metrics.observe_replicas(self.ranks.count(self._replicas()))

    def _replicas(self) -> list[int | None]:
        return [session.record.replica for session in self.sessions.values()]

    def _close(self, session: Session) -> None:
        """The session's last task goes on by itself: the client need not wait for aborted forks to drain."""
        task = session.close()
        if task is None or task.done():
            self._forget(session)
        else:
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            task.add_done_callback(lambda _: self._forget(session))

    def _forget(self, session: Session) -> None:
        self.sessions.pop(session.rid, None)
        self.history[session.rid] = session.record
        while len(self.history) > self.settings.history:
            self.history.popitem(last=False)
        try:
            self.learner.save()
        except OSError as error:
            logger.error("specgen: the adaptive state was not saved: %s", error)
        self.metrics.observe(session.record, len(self.sessions))
        self.metrics.observe_replicas(self.ranks.count(self._replicas()))

    def record(self, search: str) -> SearchRecord | None:
        session = self.sessions.get(search)
        return session.record if session else self.history.get(search)

    def records(self) -> list[SearchRecord]:
        return [*self.history.values(), *(session.record for session in self.sessions.values())]

    # ---- messages from the scheduler (rank 0 sends for all)

    def on_trigger(self, message: TriggerFired) -> None:
        session = self.sessions.get(message.rid or "")
        if session is not None:
            session.notify(message)

    def on_point(self, message: ForkPointDone) -> None:
        session = self.sessions.get(message.rid or "")
        if session is not None:
            session.notify(message)
