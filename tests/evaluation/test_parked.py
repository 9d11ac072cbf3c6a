"""A worker's judges of former tasks wait for their next candidates: as many as it may keep, and where there is room."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.evaluation.base import Status, Task, Verdict
from specgen_engine.evaluation.worker import Worker

from .conftest import TASK, Judge, PoolThread, module
from .test_killed import kill, processes_of


def task(name: str) -> Task:
    return Task(f"{TASK.source}\n# {name}", name)


def folders(pool_thread: PoolThread) -> set[str]:
    """One a judge that lives."""
    found = set()
    for process in processes_of(pool_thread, "judge"):
        try:
            found.add(Path(os.readlink(f"/proc/{process.pid}/cwd")).name)
        except OSError:
            continue
    return found


def judged(judge: Judge, name: str) -> Verdict:
    verdict = judge(module(), task(name))
    assert verdict.status is Status.CORRECT, verdict
    return verdict


def test_three_tasks_by_turns_have_one_judge_each(pool_thread: PoolThread, judge: Judge) -> None:
    for name in "abc":
        judged(judge, name)
    known = folders(pool_thread)
    assert len(known) == 3
    assert "reference" not in judged(judge, "a").overhead  # a GPU's step: nobody waits for a judge here
    for name in "bcab":
        judged(judge, name)
    assert folders(pool_thread) == known


def test_the_one_longest_unused_goes(pool_thread: PoolThread, judge: Judge) -> None:
    seen = []
    for name in "abcad":
        judged(judge, name)
        seen.append(folders(pool_thread))
    assert len(seen[3]) == len(seen[4]) == 3
    assert len(seen[4] - seen[3]) == 1, "d's is new"
    judged(judge, "a")
    judged(judge, "c")
    assert folders(pool_thread) == seen[4], "b's went, a's was used after it"


def test_one_that_was_killed_while_it_waited_has_a_successor(pool_thread: PoolThread, judge: Judge) -> None:
    judged(judge, "a")
    mine = folders(pool_thread)
    judged(judge, "b")
    kill([process for process in processes_of(pool_thread, "judge") if Path(process.cwd()).name in mine])
    deadline = time.monotonic() + 5
    while folders(pool_thread) & mine and time.monotonic() < deadline:
        time.sleep(0.01)
    verdict = judged(judge, "a")
    assert "made_again" not in verdict.conditions


class Few:
    """What Worker's parking needs of a worker."""

    def __init__(self, roomy: bool, judges: int) -> None:
        self.roomy, self.on_gpu, self.limits = roomy, True, SimpleNamespace(judges=judges)
        self.parked: dict[str, Any] = {}
        self.ended: list[str] = []

    def _silence(self, child: Any, patience_s: float) -> None:
        if child is not None:
            self.ended.append(child.name)
            self.parked = {key: kept for key, kept in self.parked.items() if kept[0] is not child}

    end_parked = Worker.end_parked


@pytest.fixture
def children() -> list[Any]:
    return [SimpleNamespace(name=name, ended=False, pending=0, inbox=[]) for name in "abc"]


@pytest.mark.parametrize(
    ("roomy", "judges", "ended"), [(True, 3, ["a"]), (True, 2, ["a", "b"]), (True, 1, ["a", "b", "c"])]
)
def test_as_many_are_kept_as_are_allowed(children: list[Any], roomy: bool, judges: int, ended: list[str]) -> None:
    few = Few(roomy, judges)
    for child in children:
        Worker._park(few, child, child.name, True)  # type: ignore[arg-type]
    assert few.ended == ended


def test_none_waits_on_a_gpu_without_room(children: list[Any]) -> None:
    few = Few(True, 3)
    Worker._park(few, children[0], "a", True)  # type: ignore[arg-type]
    Worker.note_room(few, False)  # type: ignore[arg-type]
    Worker._park(few, children[1], "b", True)  # type: ignore[arg-type]
    Worker.note_room(few, True)  # type: ignore[arg-type]
    assert (few.ended, few.parked) == (["a", "b"], {})


def test_one_that_still_works_for_a_job_that_was_cut_off_does_not_wait(children: list[Any]) -> None:
    few = Few(True, 3)
    children[0].pending, children[1].pending, children[1].inbox = 2, 1, [{}]
    for child in children[:2]:
        Worker._park(few, child, child.name, True)  # type: ignore[arg-type]
    assert (few.ended, list(few.parked)) == (["a"], ["b"])
