"""State that SpecGen keeps beside one SGLang scheduler (one a tensor-parallel rank)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from specgen_engine import versions
from specgen_engine.config import SpecGenConfig
from specgen_engine.controller.entropy import top_k_entropy
from specgen_engine.controller.thinking import Phase, PhaseState, ReasoningPhase, ThinkingStyle
from specgen_engine.controller.triggers import Trigger, parse_trigger, wanted_logprobs, weighed
from specgen_engine.evaluation.engine_turn import EngineTurn
from specgen_engine.protocol import EndSearch, ForkPoint, ForkPointDone, TriggerFired, WatchSearch, is_fork, search_of
from specgen_engine.scheduler.fork_point import holds_kv, insert_fork_point
from specgen_engine.scheduler.policy import (
    Fork,
    Limits,
    Load,
    admissible_forks,
    base_steps_aside,
    forks_in_the_way,
    forks_to_retract,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Watched:
    """A base request whose tokens are read as they are decoded."""

    rid: str
    trigger: Trigger
    phase: ReasoningPhase
    trigger_state: Any
    phase_state: PhaseState
    seen: int = 0
    reasoning: int = 0
    inserted: int = 0
    wanted: list[int] = field(default_factory=list)
    aside: bool = False
    steps: int = 0


@dataclass(slots=True)
class Retracted:
    """Requests put back into the waiting queue since start-up, by us or by SGLang; not bases that step aside."""

    forks: int = 0
    ordinary: int = 0


class SchedulerExtension:
    """Token-level triggers, fork points and the speculative class of one scheduler."""

    def __init__(self, scheduler: Any, settings: SpecGenConfig) -> None:
        self.scheduler = scheduler
        self.limits = Limits(
            batch_share=settings.scheduler.batch_share,
            headroom=settings.scheduler.headroom,
            per_search=settings.fork.per_search,
            total=settings.fork.total,
            max_running=scheduler.max_running_requests,
        )
        self.base_share = settings.scheduler.base_share
        self.ahead = drafts_ahead(scheduler.server_args)
        self.watched: dict[str, Watched] = {}
        self.retracted = Retracted()
        self.turn: EngineTurn | None = None
        self._pieces: dict[int, str] = {}

    # ---- control messages, broadcast to every rank

    def watch(self, message: WatchSearch) -> None:
        trigger = parse_trigger(message.trigger)
        phase = ReasoningPhase(ThinkingStyle("request", message.open_mark, message.close_mark), opened=message.opened)
        self.watched[message.rid] = Watched(message.rid, trigger, phase, trigger.start(), phase.start())

    def end(self, message: EndSearch) -> None:
        self.watched.pop(message.rid, None)

    def point(self, message: ForkPoint) -> ForkPointDone:
        """A fork point asked for by the controller; when the request holds no KV yet, it is made once it does."""
        req, state = self._find(message.rid)
        watched = self.watched.get(message.rid)
        inserted = 0
        if req is not None and state == "running":
            inserted = insert_fork_point(req, message.length, self.scheduler.tree_cache)
            if watched is not None:
                watched.inserted = max(watched.inserted, inserted)
        elif state == "waiting" and watched is not None:
            watched.wanted.append(message.length)
        return ForkPointDone(rid=message.rid, asked=message.length, inserted=inserted, state=state)

    def _find(self, rid: str) -> tuple[Any, str]:
        scheduler = self.scheduler
        for batch in (scheduler.running_batch, scheduler.last_batch):
            for req in batch.reqs if batch is not None else ():
                if req.rid == rid:
                    if req.finished():
                        return req, "finished"
                    return req, "running" if holds_kv(req) else "waiting"
        waiting = any(req.rid == rid for req in scheduler.waiting_queue)
        chunked = scheduler.chunked_req is not None and scheduler.chunked_req.rid == rid
        return None, "waiting" if waiting or chunked or rid in self.watched else "unknown"

    # ---- every processed batch

    def observe(self, reqs: Iterable[Any]) -> None:
        """Read the tokens that this step gave to watched requests; fire triggers and make fork points."""
        for req in reqs:
            watched = self.watched.get(req.rid)
            if watched is None or req.is_retracted:
                continue
            if watched.wanted and holds_kv(req):
                watched.wanted = [n for n in watched.wanted if not self._made(req, watched, n)]
            output = req.output_ids
            while watched.seen < len(output):
                token = output[watched.seen]
                watched.seen += 1
                self._step(req, watched, token)

    def _made(self, req: Any, watched: Watched, length: int) -> bool:
        if length > versions.current().kv.committed(req):
            return False
        watched.inserted = insert_fork_point(req, length, self.scheduler.tree_cache)
        return True

    def _step(self, req: Any, watched: Watched, token: int) -> None:
        piece = self._piece(token)
        before = watched.phase_state.phase
        watched.phase_state = watched.phase.step(watched.phase_state, piece)
        if not (before is watched.phase_state.phase is Phase.THINKING):
            return
        watched.reasoning += 1
        if wanted_logprobs(watched.trigger):
            watched.trigger_state = weighed(watched.trigger, watched.trigger_state, _entropy(req, watched.seen - 1))
        watched.trigger_state, fired = watched.trigger.step(watched.trigger_state, piece, watched.reasoning)
        if fired is None or not holds_kv(req):
            return
        length = len(req.origin_input_ids) + watched.seen
        watched.inserted = insert_fork_point(req, length, self.scheduler.tree_cache)
        self.scheduler.ipc_channels.send_to_tokenizer.send_output(
            TriggerFired(
                rid=req.rid, trigger=fired, length=length, reasoning_tokens=watched.reasoning, inserted=watched.inserted
            )
        )

    def _piece(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self.scheduler.tokenizer.decode([token], skip_special_tokens=False)
        return piece

    # ---- the speculative class

    def split_waiting(self, running: list[Any]) -> tuple[list[Any], list[Any], Load]:
        """(queue for this step, forks held back, load): ordinary requests first, then the forks that may join."""
        scheduler = self.scheduler
        ordinary = self._ordinary_waiting()
        forks = [req for req in scheduler.waiting_queue if is_fork(req.rid)]
        load = self._load(ordinary, running)
        admitted = set(admissible_forks(load, [self._fork(req) for req in forks], self.limits))
        queue = ordinary + [req for req in forks if req.rid in admitted]
        chosen = set(queue)
        return queue, [req for req in scheduler.waiting_queue if req not in chosen], load

    def _fork(self, req: Any) -> Fork:
        search = search_of(req.rid)
        watched = self.watched.get(search)
        prefix = min(watched.inserted, len(req.origin_input_ids)) if watched else 0
        new_tokens = len(req.origin_input_ids) - prefix + req.sampling_params.max_new_tokens
        return Fork(req.rid, search, new_tokens + self.ahead + self.scheduler.page_size)

    def _ordinary_waiting(self) -> list[Any]:
        aside = {rid for rid, watched in self.watched.items() if watched.aside}
        return [req for req in self.scheduler.waiting_queue if not is_fork(req.rid) and req.rid not in aside]

    def _load(self, ordinary: list[Any], running: list[Any]) -> Load:
        scheduler = self.scheduler
        ratio = scheduler.new_token_ratio_tracker.current
        alive = [req for req in running if not req.finished()]
        forks = [req for req in alive if is_fork(req.rid)]
        promised = sum(
            (req.sampling_params.max_new_tokens - len(req.output_ids)) * (1.0 if is_fork(req.rid) else ratio)
            for req in alive
        )
        allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        return Load(
            ordinary_waiting=len(ordinary),
            ordinary_running=len(alive) - len(forks),
            forks_running=tuple(search_of(req.rid) for req in forks),
            pool_tokens=scheduler.max_total_num_tokens,
            free_tokens=allocator.available_size() + tree.evictable_size(),
            promised_tokens=int(promised),
            asked_tokens=sum(
                len(req.origin_input_ids) + req.sampling_params.max_new_tokens + self.ahead for req in ordinary
            ),
        )

    def give_way(self, batch: Any) -> None:
        """Before ordinary requests are admitted: they find the pool as it is without forks, or room to spare."""
        if not self.scheduler.waiting_queue or not _runs_forks(batch):
            return
        if forks_in_the_way(self._load(self._ordinary_waiting(), batch.reqs)):
            while self._retract_fork(batch, "ordinary requests ask for its KV"):
                pass

    def make_room(self, batch: Any, load: Load, ordinary_admitted: bool) -> None:
        """Retract running forks when an ordinary request was kept out of this step; those first that lose least.

        Chosen by what every tensor-parallel rank sees alike; a clock is none of it.
        """
        for _ in range(forks_to_retract(load, ordinary_admitted)):
            if not self._retract_fork(batch, "an ordinary request waits"):
                return

    def keep_memory(self, batch: Any) -> None:
        """Retract forks until the next decode step fits the pool, before SGLang looks whether it does.

        SGLang's own retraction ends with an estimate of how much running requests will still take, by which it then
        admits ordinary requests: forks, which come and go by other rules, have no part in it.
        """
        if not _runs_forks(batch):
            return
        batch.filter_batch()
        while batch.reqs and not batch.check_decode_mem():
            if not self._retract_fork(batch, "the next step does not fit the pool"):
                return

    def _retract_fork(self, batch: Any, reason: str) -> bool:
        """The running fork that loses least goes back to the waiting queue; False when no fork runs."""
        youngest = max(
            (i for i, req in enumerate(batch.reqs) if is_fork(req.rid) and not req.finished()),
            key=lambda i: (-len(batch.reqs[i].output_ids), i),
            default=None,
        )
        if youngest is None:
            return False
        logger.info("fork %s retracted: %s", batch.reqs[youngest].rid, reason)
        self._retract(batch, youngest)
        return True

    def queued(self, req: Any, is_retracted: bool) -> None:
        """A request joins the waiting queue."""
        if is_retracted and is_fork(req.rid):
            self.retracted.forks += 1
        elif is_retracted:
            self.retracted.ordinary += 1

    def _retract(self, batch: Any, index: int) -> None:
        """Back to the waiting queue, as SGLang's own retraction does it at this point of the loop."""
        req = batch.reqs[index]
        versions.current().kv.release(batch, index, self.scheduler.server_args)
        batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i != index])
        batch.batch_is_full = False
        self.scheduler._add_request_to_queue(req, is_retracted=True)

    # ---- base requests step aside for their own forks (scheduler.base_share)

    def step_aside(self, batch: Any) -> None:
        """Take bases out of the decode batch, or let them back in, by base_steps_aside. Their KV waits in the tree."""
        if self.base_share >= 1:
            return
        forking = {search_of(req.rid) for req in batch.reqs if is_fork(req.rid) and not req.finished()}
        for rid, watched in self.watched.items():
            watched.steps = watched.steps + 1 if rid in forking else 0
            wanted = rid in forking and base_steps_aside(watched.steps, self.base_share)
            if watched.aside and not wanted:
                watched.aside = False
            elif wanted and not watched.aside:
                self._put_aside(batch, watched)

    def _put_aside(self, batch: Any, watched: Watched) -> None:
        index = next((i for i, req in enumerate(batch.reqs) if req.rid == watched.rid and holds_kv(req)), None)
        if index is None:
            return
        req = batch.reqs[index]
        committed = versions.current().kv.committed(req)
        watched.inserted = insert_fork_point(req, committed, self.scheduler.tree_cache)
        self._retract(batch, index)
        req.retraction_count -= 1
        self.retracted.ordinary -= 1
        watched.aside = True


def drafts_ahead(server_args: Any) -> int:
    """KV tokens that SGLang keeps allocated ahead of each decoding request: two steps' drafts, 0 without speculation
    (mem_cache/allocation_sizing.py, get_alloc_reserve_per_decode)."""
    if not getattr(server_args, "speculative_algorithm", None):
        return 0
    chain = (server_args.speculative_num_steps or 1) * (server_args.speculative_eagle_topk or 1)
    return 2 * max(chain, server_args.speculative_num_draft_tokens or 0)


def _entropy(req: Any, index: int) -> float:
    """Of the distribution that an output token came from, nats; logits are gathered, so every rank gets the same."""
    rows = req.logprob.output_top_logprobs_val if req.return_logprob else None
    return top_k_entropy(rows[index]) if rows and index < len(rows) else 0.0


def _runs_forks(batch: Any) -> bool:
    return any(is_fork(req.rid) for req in batch.reqs)
