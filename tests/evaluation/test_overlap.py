"""The reference is loaded and built while its candidate is imported and constructed; what a worker kills is dead."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.evaluation import checked
from specgen_engine.evaluation.base import Stage, Status, Task
from specgen_engine.evaluation.checked import Checked
from specgen_engine.evaluation.gpuroom import promised

from .conftest import TASK, module

BUILD_S, DEVICE = 1.0, "cuda:77"
SLOW = f"import time; time.sleep({BUILD_S})"


def slow_to_build(source: str) -> str:
    return source.replace("super().__init__()", f"super().__init__(); {SLOW}")


def test_both_sides_are_constructed_at_once(judge) -> None:
    verdict = judge(slow_to_build(module()), Task(slow_to_build(TASK.source), "slow"))
    assert verdict.status is Status.CORRECT, verdict
    assert BUILD_S < verdict.stages[Stage.COMPILE] < 1.8 * BUILD_S  # one after the other: 2 * BUILD_S
    assert verdict.overhead["inputs"] + verdict.overhead["fork"] < 0.8 * BUILD_S


ARGUMENT = TASK.source.replace("return [512]", "return [torch.arange(512.0)]").replace(
    "torch.randn(width)", "torch.randn(width.numel()) + width"
)


def test_arguments_with_tensors_are_laid_out_first(judge) -> None:
    candidate = module("return torch.softmax(x, -1) * self.weight").replace(
        "torch.randn(width)", "torch.randn(width.numel()) + width"
    )
    assert judge(candidate, Task(ARGUMENT, "argument")).status is Status.CORRECT


def test_a_reference_that_fails_while_the_candidate_is_constructed_is_the_tasks_fault(judge) -> None:
    broken = TASK.source.replace("super().__init__()", "super().__init__(); raise OSError('no weights here')")
    verdict = judge(slow_to_build(module()), Task(broken, "broken"))
    assert verdict.status is Status.RUNTIME_ERROR
    assert "the task's reference failed" in verdict.reason
    assert "no weights here" in verdict.reason


class Script:
    """A worker on a GPU whose judge and candidate say what a test wants, when it wants; everything asked is noted."""

    def __init__(self, said: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.said, self.log, self.patience = said, list[str](), dict[str, float]()
        self.judge = SimpleNamespace(kind="judge", inbox=[], ended=False, pending=2, fds=[], close_fds=lambda: None)
        self.child = SimpleNamespace(kind="candidate", inbox=[], ended=False, pending=1, heard=0.0)
        self.on_gpu, self.judge_placed, self.stage, self.device = True, False, "import", DEVICE
        self.too_much = sys.maxsize
        self.free: list[int] = []  # bytes of the GPU at each look, of which one evaluation needs 1
        monkeypatch.setattr(checked, "gpu_turn", self._turn)

    @contextmanager
    def _turn(self, *_: object) -> Iterator[Any]:
        self.log.append("turn")
        yield SimpleNamespace(
            looking=nullcontext, alone=self._alone, beside_others=lambda _pump: self.log.append("beside others")
        )
        self.log.append("turn ends")

    def _alone(self) -> float:
        self.log.append("alone")
        return 0.0

    def wait(self, seconds: float) -> None:
        assert self.free, "nobody else has the GPU"

    def ask(self, who: Any, message: dict[str, Any], fds: object = ()) -> None:
        self.log.append(f"{who.kind} {message['op']}")
        who.pending += 1
        replies = {"place": "placed", "room": "room", "construct": "constructed", "open": "opened"}
        free = self.free.pop(0) if message["op"] == "room" and self.free else 9
        who.inbox.append({"event": replies[message["op"]], "free": free, "need": 1})

    def reply(self, who: Any, seconds: float, doing: str, unless: Any = None, **_: object) -> dict[str, Any]:
        while not who.inbox:
            if unless is not None and unless.inbox:
                return {}
            kind, message = self.said.pop(0)
            speaker = self.judge if kind == "judge" else self.child
            speaker.inbox.append(message)
            speaker.heard = time.monotonic()
        who.pending -= 1
        self.patience[doing] = seconds
        self.log.append(f"{who.kind}: {who.inbox[0]['event']}")
        return who.inbox.pop(0)

    def pump(self, seconds: float) -> None:
        pass

    def require_gpu(self) -> None:
        pass

    def note_room(self, roomy: bool) -> None:
        self.log.append("room for judges" if roomy else "no room for judges")

    def clear_gpu(self) -> None:
        self.log.append("cleared")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def stages(script: Script, source: str) -> Checked:
    request = {"job": "j", "task": {"source": TASK.source, "name": "t"}, "candidate": source}
    script.limits = SimpleNamespace(check_seeds=2, parallel_checks=True, task_s=1, compile_s=1, judges=3, check_s=1)  # type: ignore[attr-defined]
    self = Checked(script, request, ExitStack())  # type: ignore[arg-type]
    self.judge, self.child = script.judge, script.child  # type: ignore[assignment]
    return self


def imported(
    said: list[tuple[str, dict[str, Any]]],
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    free: Sequence[int] = (),
    crowded: bool = False,
    too_much: int = sys.maxsize,
    harmless: bool = False,
) -> list[str]:
    """What happens while a candidate is imported on a GPU, to the end of its turn."""
    script = Script(list(said), monkeypatch)
    script.free, script.too_much = list(free), too_much
    self = stages(script, source)
    self.crowded, self.harmless, others = crowded, harmless, promised(DEVICE)
    with self.turn:
        self._import_on_gpu()
        script.log.append(f"{promised(DEVICE) - others} promised")
    assert promised(DEVICE) == others
    return script.log


LOADED = ("judge", {"event": "loaded", "init": {"l": []}, "seed": 1})
TENSORS = ("judge", {"event": "loaded", "init": None, "seed": 1})
BUILT, IMPORTED = ("judge", {"event": "built"}), ("candidate", {"event": "imported"})
PLACE, END = ["judge place", "judge: placed"], ["1 promised", "cleared", "turn ends"]
LOOK = ["judge room", "judge: room"]
ROOM = ["judge room", "judge: room", "room for judges"]


def test_a_candidate_imported_before_the_model_is_built_is_constructed_meanwhile(monkeypatch) -> None:
    log = imported([LOADED, IMPORTED, BUILT], "import triton", monkeypatch)
    early = ["judge: loaded", "candidate: imported", "turn", "candidate construct", "candidate: constructed"]
    assert log == [*early, "judge: built", *PLACE, *ROOM, *END]


def test_one_that_compiles_longer_leaves_the_gpu_to_others_once_the_judge_is_placed(monkeypatch) -> None:
    log = imported([LOADED, BUILT, IMPORTED], "load_inline", monkeypatch)
    start = ["judge: loaded", "judge: built", "turn", *PLACE, "turn ends"]
    assert log == [*start, "candidate: imported", "turn", *ROOM, *END]


def test_tensors_wait_for_their_region(monkeypatch) -> None:
    log = imported([IMPORTED, TENSORS, BUILT], "import triton", monkeypatch)
    start = ["judge: loaded", "judge: built", "turn", *PLACE]
    assert log == [*start, "candidate: imported", *ROOM, *END]


def test_what_follows_a_correct_one_leaves_the_gpu_to_checks(monkeypatch) -> None:
    log = imported([LOADED, BUILT, IMPORTED], "load_inline", monkeypatch, harmless=True)
    assert log[-3:] == ["beside others", "cleared", "turn ends"]
    assert "beside others" not in imported([LOADED, BUILT, IMPORTED], "load_inline", monkeypatch)


def test_a_context_may_take_longer_than_a_call_of_the_candidate(monkeypatch) -> None:
    script = Script([], monkeypatch)
    stages(script, "load_inline")._open({})
    assert script.log == ["candidate open", "candidate: opened"]
    assert script.patience["making a CUDA context"] >= 10 * script.limits.check_s  # type: ignore[attr-defined]


FAMILY = """
import os, sys, time
from specgen_engine.evaluation import children
children.become_subreaper()
def child(use):
    pid = os.fork()
    if pid == 0:
        use()
        time.sleep(60)
        os._exit(0)
    return pid
def nested():
    os.setsid()
    child(lambda: (os.setsid(), child(lambda: None)))
def orphans():
    for _ in range(3):
        if os.fork() == 0:
            child(os.setsid)
            os._exit(0)
spared, doomed = child(nested), child(lambda: (nested(), orphans()))
time.sleep(0.4)
before = len(children.descendants(os.getpid(), children._children_listed()))
left = children.kill_tree(doomed, {spared})
after = children.descendants(os.getpid(), children._children_listed())
print(before, left, len(after), spared in after)
children.kill_tree(spared, set())
print(len(children.descendants(os.getpid(), children._children_listed())))
"""


@pytest.mark.parametrize("misses", ["none", "all"])
def test_a_tree_is_killed_with_its_orphans_and_a_spared_one_lives(misses: str) -> None:
    """Nine run and three are zombies; the quick listing of children may miss some."""
    blind = "\nchildren._children_now = lambda pid: []" if misses == "all" else ""
    script = FAMILY.replace("children.become_subreaper()", "children.become_subreaper()" + blind)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["12 [] 3 True", "0"], done.stdout + done.stderr
