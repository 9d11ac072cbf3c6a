"""One evaluation, start to verdict: compile, check, time, check again on hidden inputs."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from . import children, sandbox
from .base import Candidate, Stage, Status, Task
from .buildcache import BuildFolder
from .children import Child
from .clock import supervisor_clock
from .gpulock import gpu_turn
from .tensors import create_region
from .timing import Speedup, skips_repeats, speedup
from .worker import Ended, Worker

TIMING_SLOTS = 2
ACQUITTALS = 4
CLOCK_SETTLES_S = 0.0003
BLOCK_NS = 40_000_000
MAX_REPEATS = 500
MIN_REPEATS = 8
MIN_BLOCKS = 3
IDLE_FACTOR, IDLE_SLACK_NS = 3, 10_000_000
"""Wall time beyond the reference's own share of waiting, at which CPU time is no measure of a candidate's work."""
UNSEEN_FACTOR, UNSEEN_SLACK_NS = 0.5, 6_000_000
CALL_SLACK_NS = 40_000
"""The slack is a scheduler tick: another process's CPU clock is brought up to date when it blocks, else every 4 ms.
A call's slack, on a GPU: a launch from Python takes that long on the host, hidden behind the flush of the L2."""


class Evaluation:
    """The stages of one candidate on one worker; each raises Ended when it ends there."""

    def __init__(self, worker: Worker, request: dict[str, Any]) -> None:
        self.worker, self.limits, self.job = worker, worker.limits, str(request["job"])
        self.task = Task(**request["task"])
        self.candidate = Candidate(request["candidate"])
        self.stages: dict[str, float] = {}
        self.layouts: dict[int, Any] = {}
        self.fresh: list[int] = []
        self.repeats: list[int] = []
        self.reference: list[int] = []
        self.unseen: list[tuple[int, int]] = []
        self.idle: list[bool] = []
        self.waited_s = self.own_s = 0.0

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        self.worker.link.send({"job": self.job, "stage": stage})
        start, waited = time.monotonic(), self.waited_s
        try:
            yield
        finally:
            self.stages[stage] = round(time.monotonic() - start - (self.waited_s - waited), 4)

    @contextmanager
    def own(self) -> Iterator[None]:
        """The candidate's own time: what is spent in here is no overhead of the harness."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.own_s += time.monotonic() - start

    def run(self) -> Speedup:
        worker = self.worker
        with ExitStack() as held:
            regions: tuple[int, ...] = ()
            if not worker.on_gpu:
                regions = (create_region("inputs"), create_region("outputs"))
                for fd in regions:
                    held.callback(os.close, fd)
            build = held.enter_context(BuildFolder(worker.cache, self.candidate.hash))
            held.callback(lambda: worker.end(worker.candidate))
            with self.stage(Stage.COMPILE):
                self._compile(regions, build, held)
                build.keep()
            with self.stage(Stage.CHECK):
                self._check()
            with self.stage(Stage.TIME):
                result = self._time()
                self._check_hidden()
            return result

    # -- compile ---------------------------------------------------------------------------------------------------

    def _compile(self, regions: tuple[int, ...], build: BuildFolder, held: ExitStack) -> None:
        """On the host the judge prepares inputs meanwhile; on a GPU it waits until the GPU is this evaluation's."""
        worker = self.worker
        worker.stage = "import"
        self.child = worker.start_candidate(self.candidate, regions, build.path)
        self.judge = worker.judge_for(self.task)
        if not worker.on_gpu:
            self._begin(regions)
        with self.own():
            worker.reply(self.child, self.limits.compile_s, "importing the module")
        if worker.on_gpu:
            self._take_gpu(held)
            self._begin(())
        worker.stage = "construct"
        begun = self._judge_reply("loading the reference")
        while begun.get("event") != "begun":
            begun = self._judge_reply("loading the reference")
        shared = tuple(self.judge.fds)
        with self.own():
            said = {key: begun[key] for key in ("init", "weights", "seed", "sizes")}
            worker.ask(self.child, {"op": "construct"} | said, shared)
            self.judge.close_fds()
            worker.reply(self.child, self.limits.compile_s, "constructing ModelNew")

    def _begin(self, regions: tuple[int, ...]) -> None:
        self.owed = self.limits.check_seeds + TIMING_SLOTS + 1
        self.judge.close_fds()
        self.worker.ask(self.judge, {"op": "begin", "sets": self.owed + ACQUITTALS}, regions)
        for slot in range(self.owed):
            self.worker.ask(self.judge, {"op": "prepare", "slot": slot, "seed": secrets.randbits(48)})

    def _take_gpu(self, held: ExitStack) -> None:
        """Wait for the GPU; when the evaluation ends, nothing of it is left there before the next one's turn."""
        worker = self.worker
        while self.judge.pending:  # its import and construction on the host need no GPU
            self._judge_reply("loading the reference")
        self.waited_s = held.enter_context(gpu_turn(worker.device, worker.wait))
        held.callback(worker.release_judge)
        held.callback(lambda: worker.end(worker.candidate))

    def _judge_reply(self, doing: str) -> dict[str, Any]:
        return self.worker.reply(self.judge, self.limits.task_s, doing)

    def _layout(self, slot: int) -> Any:
        """The inputs of a slot; the judge answers in the order of slots."""
        while slot not in self.layouts:
            self.layouts[len(self.layouts)] = self._judge_reply("preparing inputs")["inputs"]
        return self.layouts[slot]

    # -- check -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self.worker.stage = "check"
        for slot in range(self.limits.check_seeds):
            self._check_slot(slot)

    def _check_hidden(self) -> None:
        self._check_slot(self.limits.check_seeds + TIMING_SLOTS, " (on inputs kept back until after timing)")

    def _check_slot(self, slot: int, note: str = "") -> None:
        layout = self._layout(slot)
        with self.own():
            self.worker.ask(self.child, {"op": "run", "inputs": layout})
            ran = self.worker.reply(self.child, self.limits.check_s, "running on fresh inputs")
        self._compare(slot, ran, note)

    def _compare(self, slot: int, ran: dict[str, Any], note: str = "") -> None:
        self._layout(self.owed - 1)  # replies of the judge come in order: take those owed first
        keys = ("outputs", "inputs", "aliases", "previous")
        if ran.get("event") != "ran" or any(key not in ran for key in keys):
            raise Ended(Status.REJECTED, "forged message: not the answer that was asked for")
        self.worker.ask(self.judge, {"op": "compare", "slot": slot} | {key: ran[key] for key in keys})
        found = self._judge_reply("comparing")
        if found["status"] != "ok":
            status = Status.WRONG if found["status"] == "wrong" else Status.REJECTED
            raise Ended(status, found["reason"] + note, found["reason"])

    # -- time ------------------------------------------------------------------------------------------------------

    def _time(self) -> Speedup:
        worker = self.worker
        worker.stage = "time"
        slots = list(range(self.limits.check_seeds, self.limits.check_seeds + TIMING_SLOTS))
        worker.ask(self.child, {"op": "stage", "inputs": {str(slot): self._layout(slot) for slot in slots}})
        worker.reply(self.child, self.limits.check_s, "taking the timing inputs")
        self.deadline = time.monotonic() + self.limits.time_s
        first = self._block(slots)
        self.fresh = first
        self._show(slots[-1])
        count = self._repeats_for_a_block(first)
        budget = time.monotonic() + self.limits.timing_budget_s
        self.reference.clear()
        self.unseen.clear()
        self.idle.clear()
        for block in itertools.count():
            # Every slot is the last, and shown, at least once: a result kept from other contents must come to light.
            sequence = [secrets.choice(slots) for _ in range(count - 1 - secrets.randbelow(count // 2))]
            sequence.append(slots[block % len(slots)])
            times = self._block(sequence)
            self.repeats += times
            count = self._repeats_for_a_block(times)
            result = speedup(self.reference, self.repeats, seed=len(self.repeats))
            enough = len(self.repeats) >= MIN_REPEATS and result.half_width <= self.limits.precision
            last = block + 1 >= MIN_BLOCKS and (enough or time.monotonic() > budget)
            if last or block < len(slots) or secrets.randbelow(4) == 0:
                self._show(sequence[-1])
            if last:
                break
        self._reject_tricks()
        return result

    def _repeats_for_a_block(self, times: list[int]) -> int:
        """As many as fill a block at the pace of these; fewer when the wall clock runs much faster than the CPU's."""
        return max(2, min(MAX_REPEATS, int(BLOCK_NS * len(times) / max(sum(times), self.wall_ns / 4, 1))))

    def _block(self, sequence: list[int]) -> list[int]:
        """The reference, then the candidate, on the same slots; both are also timed from here."""
        spent: list[int] = []
        walls: list[int] = []
        times: list[list[int]] = []
        for child, doing in ((self.judge, "timing the reference"), (self.child, "timing")):
            runs_code = children.innermost(child.pid, sandbox.around(self.worker.level))
            now = supervisor_clock(self.worker.device, self.limits.threads, runs_code)
            start, began = now(), time.perf_counter_ns()
            self.worker.ask(child, {"op": "time", "sequence": sequence})
            left = max(0.1, self.deadline - time.monotonic())
            answer = self.worker.reply(child, left, doing)
            walls.append(time.perf_counter_ns() - began)
            self.own_s += walls[-1] / 1e9
            time.sleep(CLOCK_SETTLES_S)
            spent.append(now() - start)
            times.append(_times(child, answer, len(sequence), spent[-1]))
        self.reference += times[0]
        around = (spent[0] - sum(times[0]), spent[1] - sum(times[1]))
        self.unseen.append((around[1] - around[0], sum(times[1])))
        self.idle.append((walls[1] - IDLE_SLACK_NS) * spent[0] > IDLE_FACTOR * spent[1] * walls[0])
        self.wall_ns, self.calls = walls[1], len(sequence)
        return times[1]

    def _show(self, slot: int) -> None:
        self.worker.ask(self.child, {"op": "show"})
        shown = self.worker.reply(self.child, self.limits.check_s, "showing the last result")
        self._compare(slot, shown, " (in a timed call)")

    def _reject_tricks(self) -> None:
        if skips_repeats(self.fresh, self.repeats) and self._slow_on_unseen_again():
            raise Ended(Status.REJECTED, "it is fast only on inputs that it has seen before")
        slack = UNSEEN_SLACK_NS + (CALL_SLACK_NS * self.calls if self.worker.on_gpu else 0)
        if median(extra - UNSEEN_FACTOR * told for extra, told in self.unseen) > slack:
            raise Ended(Status.REJECTED, "it reports less time than the supervisor's clock saw")
        if all(self.idle):
            raise Ended(Status.REJECTED, "it waits, or lets other processes work, while its own CPU clock stands still")

    def _slow_on_unseen_again(self) -> bool:
        """Suspected of remembering inputs: a few more sets that it can't know, each called when it is warm."""
        slots = [self.owed + extra for extra in range(ACQUITTALS)]
        known = self.limits.check_seeds
        for slot in slots:
            self.worker.ask(self.judge, {"op": "prepare", "slot": slot, "seed": secrets.randbits(48)})
        self.worker.ask(self.child, {"op": "stage", "inputs": {str(slot): self._layout(slot) for slot in slots}})
        self.worker.reply(self.child, self.limits.check_s, "taking the timing inputs")
        self.deadline = time.monotonic() + self.limits.time_s
        fresh = [self._block([known, known, slot])[2] for slot in slots]
        return skips_repeats(fresh, self.repeats)


def _times(child: Child, answer: dict[str, Any], count: int, spent_ns: int) -> list[int]:
    """The times of an answer; a candidate that reports impossible ones is rejected."""
    times = answer.get("ns")
    if (
        not isinstance(times, list)
        or len(times) != count
        or not all(type(value) is int and value > 0 for value in times)
        or sum(times) > spent_ns * 1.05 + UNSEEN_SLACK_NS
    ):
        raise Ended(Status.REJECTED, f"forged message: the times of the {child.kind} are impossible")
    return times


def evaluate(worker: Worker, request: dict[str, Any]) -> dict[str, object]:
    """The message with the verdict. Raises only PoolGone."""
    evaluation = Evaluation(worker, request)
    verdict: dict[str, object] = {
        "candidate": evaluation.candidate.hash,
        "device": worker.device,
        "sandbox": worker.level,
    }
    try:
        result = evaluation.run()
        verdict |= {
            "status": Status.CORRECT,
            "speedup": round(result.speedup, 4),
            "interval": [round(result.low, 4), round(result.high, 4)],
            "candidate_ms": round(result.candidate_ms, 6),
            "reference_ms": round(result.reference_ms, 6),
        }
    except Ended as ended:
        verdict |= {"status": ended.status, "reason": ended.reason, "digest": ended.digest}
    spent = {"stages": evaluation.stages, "own_s": round(evaluation.own_s, 4), "waited": evaluation.waited_s}
    return {"job": evaluation.job, "verdict": verdict | spent}


def check_task(worker: Worker, request: dict[str, Any]) -> dict[str, object]:
    """The message with what is wrong with a task, None when nothing is. Raises only PoolGone."""
    try:
        judge = worker.judge_for(Task(**request["task"]))
        if judge.pending:
            worker.reply(judge, worker.limits.task_s, "loading the reference")
        with ExitStack() as held:
            regions: tuple[int, ...] = ()
            if worker.on_gpu:
                held.enter_context(gpu_turn(worker.device, worker.wait))
                held.callback(worker.release_judge)
                held.callback(judge.close_fds)
            else:
                regions = (create_region("inputs"), create_region("outputs"))
                for fd in regions:
                    held.callback(os.close, fd)
            worker.ask(judge, {"op": "begin", "sets": 1}, regions)
            worker.reply(judge, worker.limits.task_s, "loading the reference")
            worker.ask(judge, {"op": "probe"})
            answer = worker.reply(judge, worker.limits.task_s, "running the reference")
            error = str(answer["error"]) or None
    except Ended as ended:
        error = ended.reason.removeprefix("the task's reference failed: ")
    return {"job": request["job"], "task": error}
