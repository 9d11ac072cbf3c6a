"""One evaluation, start to verdict: compile, check, time, check again on hidden inputs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .base import Stage, Status, Task
from .buildcache import BuildFolder
from .candidates.forms import detect_form
from .engine_turn import engine_still
from .gpulock import gpu_turn
from .gpuroom import is_refused_memory, note_shortage
from .guards import Guard
from .profile.base import AUTO
from .profile.floor import share_of_roofline
from .profile.stage import Subjected, profile_candidate
from .tensors import create_region
from .timed import Timed
from .timing import Speedup
from .worker import Ended, Lost, Worker


class Evaluation(Timed):
    """The stages of one candidate on one worker; each raises Ended when it ends there."""

    def __init__(self, worker: Worker, request: dict[str, Any], held: ExitStack) -> None:
        super().__init__(worker, request, held)
        self.profile_by = str(request.get("profile") or (AUTO if request["op"] == "profile" else ""))
        self.profile: dict[str, Any] | None = None
        self.roofline: float | None = None

    def run(self) -> Speedup:
        worker, held = self.worker, self.held
        self._refuse_known_hang()
        regions: tuple[int, ...] = ()
        if not worker.on_gpu:
            regions = (create_region("inputs"), create_region("outputs"))
            for fd in regions:
                held.callback(os.close, fd)
        build = held.enter_context(BuildFolder(worker.cache, self.candidate.hash, worker.take_prepared))
        held.callback(worker.bury_candidate)
        held.enter_context(self.turn)
        with self.stage(Stage.COMPILE):
            self._compile(regions, build)
            build.keep()
        with self.stage(Stage.CHECK):
            self._check()
        with self.step("spare"):  # none, unless a cancelled evaluation left one on its way
            worker.await_warm(heed_cancel=True)
        if worker.on_gpu:
            self.waited_s += self.gpu.alone()
        if self.lent:
            self._await_quiet()
        with self._engine_still(), self.stage(Stage.TIME):
            result = self._time()
            self._check_hidden()
            with self.step("roofline"):
                enforced = Guard.FLOOR not in self.off
                self.roofline = share_of_roofline(worker, self.judge, self.checks, result.candidate_ms, enforced)
        if self.profile_by:
            with self._engine_still(), self.stage(Stage.PROFILE):
                worker.stage = "profile"
                self.profile = profile_candidate(worker, self._subjected(build.path, result), self.profile_by)
        if worker.on_gpu:
            with self._engine_still(), self.own():
                self._extra_times()
        return result

    @contextmanager
    def _engine_still(self) -> Iterator[None]:
        """What it takes to stop an engine that serves on this device is waiting, none of the candidate's time."""
        with engine_still(self.worker.device, self.worker.wait) as stillness:
            self.waited_s += stillness.waited_s
            yield
        if not stillness.kept:
            self.conditions["engine"] = "ran"

    def _await_quiet(self) -> None:
        """Once the device is this evaluation's alone, so that copies are held off no longer than they must be."""
        start = time.monotonic()
        if self.worker.await_quiet():
            self.use = "turn, quiet"
        self.waited_s += time.monotonic() - start

    def _subjected(self, build: Path, result: Speedup) -> Subjected:
        slot, source = self.checks, self.candidate.source
        return Subjected(self.child, self.judge, source, build, slot, self.layouts[slot], result.candidate_ms)


def evaluate(worker: Worker, request: dict[str, Any]) -> None:
    """Tell the verdict, then clear away what it left. Raises only PoolGone.

    One whose judge or candidate was killed is made again, once, in fresh processes; so is one that met a GPU without
    memory, and then it has that GPU to itself. The verdict says so.
    """
    if lost := _evaluate(worker, request):
        _evaluate(worker, request, lost)


def _evaluate(worker: Worker, request: dict[str, Any], lost: str = "") -> str:
    """Why it is to be made again, with nothing told; "" once the verdict is. lost: why it was made once more."""
    with ExitStack() as held:
        evaluation = Evaluation(worker, request, held)
        evaluation.crowded = worker.on_gpu and is_refused_memory(lost)
        held.callback(worker.silence_candidate)
        verdict: dict[str, object] = {
            "candidate": evaluation.candidate.hash,
            "device": worker.device,
            "sandbox": worker.level,
            "form": detect_form(evaluation.candidate.source),
        }
        try:
            result = evaluation.run()
            evaluation.harmless = True
            verdict |= {
                "status": Status.CORRECT,
                "speedup": round(result.speedup, 4),
                "interval": [round(result.low, 4), round(result.high, 4)],
                "candidate_ms": round(result.candidate_ms, 6),
                "reference_ms": round(result.reference_ms, 6),
                "roofline": evaluation.roofline,
                "profile": evaluation.profile,
                "extra_ms": evaluation.extra_ms,
            }
        except Ended as ended:
            short = worker.on_gpu and is_refused_memory(ended.reason)
            if not lost and (isinstance(ended, Lost) or short):
                return ended.reason
            evaluation.note_hang(ended)
            verdict |= {"status": ended.status, "reason": ended.reason, "digest": ended.digest}
        with evaluation.step("kill"):
            worker.silence_candidate()
        verdict |= evaluation.shown
        verdict |= {
            "stages": evaluation.stages,
            "own_s": round(evaluation.own_s, 4),
            "waited": evaluation.waited_s,
            "overhead": evaluation.overhead(),
            "conditions": evaluation.conditions | ({"made_again": lost} if lost else {}),
        }
        worker.link.send({"job": evaluation.job, "verdict": verdict})
    return ""


def check_task(worker: Worker, request: dict[str, Any]) -> dict[str, object]:
    """The message with what is wrong with a task, None when nothing is. Raises only PoolGone.

    Where the judge was killed it is asked again, once; where the GPU had no memory, with the GPU to itself.
    """
    error, again = _try_task(worker, request, alone=False)
    if again:
        error, _ = _try_task(worker, request, alone=worker.on_gpu and is_refused_memory(again))
    return {"job": request["job"], "task": error}


def _try_task(worker: Worker, request: dict[str, Any], *, alone: bool) -> tuple[str | None, str]:
    """What is wrong with the task, and why another try may find otherwise ("": it would not)."""
    try:
        error, lost = _probe(worker, request, alone), False
    except Ended as ended:
        error, lost = ended.reason.removeprefix("the task's reference failed: "), isinstance(ended, Lost)
    short = worker.on_gpu and error is not None and is_refused_memory(error)
    return error, (error or "") if lost or short else ""


def _probe(worker: Worker, request: dict[str, Any], alone: bool) -> str | None:
    """Run the reference; what it says is wrong. Raises Ended when its process does not answer."""
    judge = worker.judge_for(Task(**request["task"]))
    while judge.pending:
        worker.reply(judge, worker.limits.task_s, "loading the reference")
    with ExitStack() as held:
        regions: tuple[int, ...] = ()
        if worker.on_gpu:
            turn = held.enter_context(gpu_turn(worker.device, worker.wait))
            if alone:
                note_shortage(worker.device)
                turn.alone()
            held.callback(worker.release_judge)
            held.callback(judge.close_fds)
        else:
            regions = (create_region("inputs"), create_region("outputs"))
            for fd in regions:
                held.callback(os.close, fd)
        worker.ask(judge, {"op": "begin", "sets": 1}, regions)
        worker.reply(judge, worker.limits.task_s, "loading the reference")
        worker.judge_placed = worker.on_gpu
        worker.ask(judge, {"op": "probe"})
        answer = worker.reply(judge, worker.limits.task_s, "running the reference")
        return str(answer["error"]) or None
