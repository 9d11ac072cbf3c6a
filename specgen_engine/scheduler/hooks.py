"""Hook handlers of the scheduler process; each is one line of plugin.HOOKS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from specgen_engine import plugin, versions
from specgen_engine.errors import HookError
from specgen_engine.modes import tree_refusal
from specgen_engine.protocol import EndSearch, ForkPoint, ReplayScript, WatchSearch, is_fork, register_messages
from specgen_engine.replay import sampler
from specgen_engine.scheduler import reports
from specgen_engine.scheduler.extension import SchedulerExtension
from specgen_engine.scheduler.policy import keep_order
from specgen_engine.scheduler.turns import engine_turn


def attach(_result: None, scheduler: Any) -> None:
    settings = scheduler.server_args.__dict__.get("specgen")
    if settings is None:
        raise HookError("SpecGen engine: the scheduler got no configuration with its ServerArgs")
    architecture = (scheduler.model_config.hf_config.architectures or [""])[0]
    if refused := tree_refusal(scheduler.tree_cache, scheduler.is_generation, architecture):
        raise HookError(f"--enable-specgen does not go with this model: {refused}")
    if settings.replay and getattr(scheduler.server_args, "speculative_algorithm", None):
        raise HookError(
            "--specgen-replay dictates what the sampler says, and drafts are verified without it: "
            "leave it or --speculative-algorithm out"
        )
    register_messages()
    extension = scheduler.specgen = SchedulerExtension(scheduler, settings)
    extension.turn = engine_turn(scheduler.server_args.device, settings.evaluation.pause)
    if (follow := getattr(scheduler.tree_cache, "follow_searches", None)) is not None:
        follow(extension.watched)

    def end(message: EndSearch) -> None:
        extension.end(message)
        sampler.forget(message.rid, message.scripts)

    handlers = {WatchSearch: extension.watch, ForkPoint: extension.point, ReplayScript: sampler.load, EndSearch: end}
    replica = replica_of(scheduler)
    mine = {message: partial(_on_replica, replica, handle) for message, handle in handlers.items()}
    scheduler._request_dispatcher._mapping.update(mine)


def replica_of(scheduler: Any) -> int | None:
    """The scheduler's data-parallel rank; None on a server without replicas."""
    if getattr(scheduler.server_args, "dp_size", 1) == 1:
        return None
    return int(versions.current().parallel(scheduler).dp_rank)


def _on_replica(replica: int | None, handle: Callable[[Any], Any], message: Any) -> Any:
    """The data-parallel controller gives control messages to every replica: one acts, and it alone answers."""
    return handle(message) if replica is None or message.replica == replica else None


def init_info(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    targets = [hook.target for hook in plugin.HOOKS if hook.process == "scheduler" and plugin.is_applied(hook)]
    report = {"hooks": targets, "rank": versions.current().parallel(scheduler).tp_rank}
    reports.leave(report)
    return {**info, "specgen": report}


def run_batch(scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    if (turn := scheduler.specgen.turn) is not None:
        turn.step()


def on_idle(scheduler: Any) -> None:
    if (turn := scheduler.specgen.turn) is not None:
        turn.idle()


def process_batch_result(_result: None, scheduler: Any, batch: Any, result: Any) -> None:
    if scheduler.specgen.watched:
        scheduler.specgen.observe(batch.reqs)


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, **arguments: Any) -> Any:
    """Ordinary requests see a queue without forks, unless none of them waits."""
    extension, running = scheduler.specgen, arguments["running_batch"]
    if not extension.watched:
        return original(scheduler, **arguments)
    extension.step_aside(running)
    extension.give_way(running)
    queue, held, load = extension.split_waiting(running.reqs)
    scheduler.waiting_queue = queue
    try:
        batch, running = original(scheduler, **arguments)
    finally:
        scheduler.waiting_queue = scheduler.waiting_queue + held
    extension.make_room(running, load, ordinary_admitted=batch is not None)
    return batch, running


def update_running_batch(original: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    """Memory that the next step lacks is taken from forks before SGLang takes it from anyone."""
    if scheduler.specgen.watched:
        scheduler.specgen.keep_memory(batch)
    return original(scheduler, batch)


def queued(_result: None, scheduler: Any, req: Any, is_retracted: bool = False) -> None:
    scheduler.specgen.queued(req, is_retracted)


def internal_state(result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    """`specgen` in /server_info's internal_states: what was retracted, is free and is remembered of searches, and how
    often and long the engine stood still for timed runs on its device (None: never does)."""
    extension = scheduler.specgen
    result.internal_state["specgen"] = {
        "forks_retracted": extension.retracted.forks,
        "ordinary_retracted": extension.retracted.ordinary,
        "free_tokens": scheduler.token_to_kv_pool_allocator.available_size(),
        "watched": len(extension.watched),
        "scripts": len(sampler.SCRIPTS),
        "replica": replica_of(scheduler),
        "pauses": asdict(extension.turn.pauses) if extension.turn is not None else None,
    }
    return result


def retraction_order(order: list[int], reqs: list[Any], *_server_args: Any, **_kwargs: Any) -> list[int] | None:
    forks = [is_fork(req.rid) for req in reqs]
    return keep_order(order, forks) if any(forks) else None
