"""What the schedulers hear before the base request, and the record that a search begins with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from specgen_engine.controller.events import SessionOptions
from specgen_engine.controller.opening import opened_record, opening
from specgen_engine.controller.request import Plan
from specgen_engine.controller.thinking import STYLES
from specgen_engine.protocol import ReplayScript, WatchSearch
from tests.controller.fakes import PROMPT, TASK

PLAN = Plan(TASK, True, "every:10", "correct", "Now: ", 0.7, 64)
OPTIONS = SessionOptions(STYLES["qwen3"], True, False, 2, 5.0, 1, PROMPT)


def script() -> Any:
    return SimpleNamespace(trace="t", number=3, reasoning_tokens=40, base_ids=lambda opened: [7, int(opened)])


def test_the_scheduler_watches_for_the_trigger_and_the_marks() -> None:
    (watch,) = opening("a", PLAN, OPTIONS, None)
    assert isinstance(watch, WatchSearch)
    assert (watch.rid, watch.trigger, watch.open_mark, watch.close_mark, watch.opened) == (
        "a", "every:10", "<think>", "</think>", True,
    )  # fmt: skip


def test_a_replay_has_its_script_there_too() -> None:
    _, play = opening("a", PLAN, OPTIONS, script())
    assert isinstance(play, ReplayScript)
    assert (play.rid, play.prompt_tokens, play.ids) == ("a", len(PROMPT), [7, 1])


def test_the_record_says_what_is_asked_and_what_is_replayed() -> None:
    live, replayed = (opened_record("a", PLAN, OPTIONS, one) for one in (None, script()))
    assert (live.task, live.trigger, live.termination, live.named, live.prompt_tokens) == (
        TASK.name, "every:10", "correct", True, 3,
    )  # fmt: skip
    assert (live.trace, live.iteration, live.recorded_reasoning_tokens) == (None, None, None)
    assert (replayed.trace, replayed.iteration, replayed.recorded_reasoning_tokens) == ("t", 3, 40)
