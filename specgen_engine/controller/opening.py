"""How a search begins: its empty record, and what the schedulers are told before its base request."""

from __future__ import annotations

import time

from specgen_engine.controller.events import Script, SessionOptions
from specgen_engine.controller.report import SearchRecord
from specgen_engine.controller.request import Plan
from specgen_engine.protocol import ReplayScript, WatchSearch


def opened_record(rid: str, plan: Plan, options: SessionOptions, script: Script | None) -> SearchRecord:
    record = SearchRecord(
        id=rid, task=plan.task.name, task_hash=plan.task.hash, trigger=plan.trigger, termination=plan.termination,
        created=time.time(), named=plan.named, prompt_tokens=len(options.prompt_ids),
    )  # fmt: skip
    if script is not None:
        record.trace, record.iteration = script.trace, script.number
        record.recorded_reasoning_tokens = script.reasoning_tokens
    return record


def opening(rid: str, plan: Plan, options: SessionOptions, script: Script | None) -> list[WatchSearch | ReplayScript]:
    style = options.style
    watch = WatchSearch(
        rid=rid, trigger=plan.trigger, open_mark=style.open, close_mark=style.close, opened=options.opened
    )
    if script is None:
        return [watch]
    return [
        watch,
        ReplayScript(rid=rid, prompt_tokens=len(options.prompt_ids), ids=script.base_ids(options.opened)),
    ]
