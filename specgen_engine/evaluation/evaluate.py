"""One evaluation, start to verdict: compile, check, time, check again on hidden inputs."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from . import children, sandbox
from .base import Candidate, Stage, Status, Task
from .buildcache import BuildFolder, remember_hang, remembered_hang
from .candidates.forms import detect_form
from .children import Child
from .clock import supervisor_clock
from .gpulock import gpu_turn
from .gpustate import conditions
from .guards import Guard, parse_guards
from .profile.base import AUTO
from .profile.floor import share_of_roofline
from .profile.stage import Subjected, profile_candidate
from .spending import Spending
from .tensors import create_region
from .timing import Speedup, skips_repeats, speedup, works_on
from .worker import Ended, JudgeLost, Worker

TIMING_SLOTS = 2
ACQUITTALS = 4
CLOCK_SETTLES_S = 0.0003
EXTRA_S = 5.0
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


class Evaluation(Spending):
    """The stages of one candidate on one worker; each raises Ended when it ends there.

    held: what is given back when the verdict has been told.
    """

    def __init__(self, worker: Worker, request: dict[str, Any], held: ExitStack) -> None:
        super().__init__(lambda stage: worker.link.send({"job": self.job, "stage": stage}))
        self.held, self.turn, self.has_turn = held, ExitStack(), False
        self.import_s = 0.0
        self.worker, self.limits, self.job = worker, worker.limits, str(request["job"])
        self.task = Task(**request["task"])
        self.candidate = Candidate(request["candidate"])
        self.off = worker.guards_off = parse_guards(request.get("guards_off", ()))
        self.checks = max(self.limits.check_seeds, self.task.cases)
        self.owed = self.checks + TIMING_SLOTS + 1
        self.sets = self.owed + ACQUITTALS
        self.shown: dict[str, Any] = {}
        self.profile_by = str(request.get("profile") or (AUTO if request["op"] == "profile" else ""))
        self.profile: dict[str, Any] | None = None
        self.roofline: float | None = None
        self.stages: dict[str, float] = {}
        self.layouts: dict[int, Any] = {}
        self.fresh: list[int] = []
        self.repeats: list[int] = []
        self.reference: list[int] = []
        self.unseen: list[tuple[int, int]] = []
        self.idle: list[bool] = []
        self.goes_on: list[bool] = []
        self.use = str(request.get("gpu_use", "turn"))
        self.extra_ms: dict[str, float] = {}
        self.conditions: dict[str, Any] = {}

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
            self._warm_spare_early()
            self._check()
        with self.step("spare"):
            worker.await_warm(heed_cancel=True)
        if worker.on_gpu:  # before the stage is told: a pool keeps KV copies off the GPU from then on
            self.waited_s += self.gpu.alone()
        with self.stage(Stage.TIME):
            result = self._time()
            self._check_hidden()
            with self.step("roofline"):
                self.roofline = share_of_roofline(worker, self.judge, self.checks, result.candidate_ms)
        if self.profile_by:
            with self.stage(Stage.PROFILE):
                worker.stage = "profile"
                self.profile = profile_candidate(worker, self._subjected(build.path, result), self.profile_by)
        if worker.on_gpu:
            with self.own():
                self._extra_times()
        return result

    def _warm_spare_early(self) -> None:
        """While this candidate compiles just in time; for one that doesn't, after its verdict (see clear_gpu)."""
        if self.worker.on_gpu and "triton" in self.candidate.source:
            with self.step("spare"):
                self.worker.begin_warming()

    def _extra_times(self) -> None:
        """Figures beside the measured ones; a candidate that fails here keeps its verdict."""
        try:
            for name, child in (("reference", self.judge), ("candidate", self.child)):
                self._extra(f"{name}_warm", child, "warm_calls")
            if self._extra("candidate_graph", self.child, "graph"):
                self._show(self.last_slot)
        except Ended as ended:
            if ended.status is Status.CANCELLED:
                raise
            self.extra_ms.pop("candidate_graph", None)
            self.conditions["extra_times"] = str(ended)[:200]

    def _extra(self, name: str, child: Child, op: str) -> bool:
        self.worker.ask(child, {"op": op})
        answer = self.worker.reply(child, EXTRA_S, "calls beside the timed ones")
        times = answer.get("ns")
        if answer.get("why"):
            self.conditions["no_graph"] = str(answer["why"])[:200]
        if isinstance(times, list) and times and all(type(value) is int and value > 0 for value in times):
            self.extra_ms[name] = round(median(times) / 1e6, 6)
        return name in self.extra_ms

    def _refuse_known_hang(self) -> None:
        cache, limits = self.worker.cache, self.limits
        reason = remembered_hang(cache, self.task.hash, self.candidate.hash) if limits.remember_hangs else None
        if reason is not None:
            raise Ended(Status.TIMEOUT, f"{reason} (when it ran before; not run again)")

    def note_hang(self, ended: Ended) -> None:
        """A call of the candidate that did not end: it is not to hold a GPU up again."""
        if ended.status is Status.TIMEOUT and self.worker.stage in ("check", "time") and self.limits.remember_hangs:
            remember_hang(self.worker.cache, self.task.hash, self.candidate.hash, str(ended))

    def _subjected(self, build: Path, result: Speedup) -> Subjected:
        slot, source = self.checks, self.candidate.source
        return Subjected(self.child, self.judge, source, build, slot, self.layouts[slot], result.candidate_ms)

    # -- compile ---------------------------------------------------------------------------------------------------

    def _compile(self, regions: tuple[int, ...], build: BuildFolder) -> None:
        """On the host the judge prepares inputs meanwhile; on a GPU it waits until the GPU is this evaluation's."""
        worker = self.worker
        worker.stage = "import"
        with self.step("fork"):
            self.child = worker.start_candidate(self.candidate, regions, build)
            self.judge = worker.judge_for(self.task)
        if worker.on_gpu:
            self._import_on_gpu()
            self._begin(())
        else:
            self._begin(regions)
            with self.own():
                worker.reply(self.child, self.limits.compile_s, "importing the module")
        worker.stage = "construct"
        with self.step("inputs"):
            begun = self._judge_reply("loading the reference")
            while begun.get("event") != "begun":
                begun = self._judge_reply("loading the reference")
        with self.step("open"):
            worker.ask(self.child, {"op": "open", "sizes": begun["sizes"]}, tuple(self.judge.fds))
            self.judge.close_fds()
            worker.reply(self.child, self.limits.check_s, "making a CUDA context")
        with self.own():
            said = {key: begun[key] for key in ("init", "weights", "seed")}
            worker.ask(self.child, {"op": "construct"} | said)
            worker.reply(self.child, self.limits.compile_s, "constructing ModelNew")

    def _import_on_gpu(self) -> None:
        """While the module is imported, the judge gets its place on the GPU, in a turn of its own when that is long."""
        worker, started, waited = self.worker, time.monotonic(), self.waited_s
        try:
            while self.judge.pending:  # its import and construction on the host need no GPU
                self._judge_reply("loading the reference")
            if not worker.judge_placed:
                with ExitStack() as early:
                    self._take_gpu(early)
                    worker.ask(self.judge, {"op": "place"})
                    self._judge_reply("loading the reference")
                    worker.judge_placed = True
                    if self.child.inbox or self.child.ended:
                        self._keep_turn(early)
            worker.reply(self.child, self.limits.compile_s, "importing the module")
            if not self.has_turn:
                self._take_gpu(self.turn)
                self._keep_turn(self.turn)
        finally:
            end = time.monotonic()
            self.import_s = max(0.0, (self.child.heard or end) - started)
            self.own_s += self.import_s
            unclaimed = end - started - (self.waited_s - waited) - self.import_s
            self.steps["reference"] = self.steps.get("reference", 0.0) + max(0.0, unclaimed)

    def _begin(self, regions: tuple[int, ...]) -> None:
        self.judge.close_fds()
        begin = {"op": "begin", "sets": self.sets, "guards_off": sorted(self.off)}
        self.worker.ask(self.judge, begin, regions)
        for slot in range(self.owed):
            self._prepare(slot, slot % self.task.cases if slot < self.checks else 0)

    def _prepare(self, slot: int, case: int = 0) -> None:
        seed = 0 if Guard.SEEDS in self.off else secrets.randbits(48)
        self.worker.ask(self.judge, {"op": "prepare", "slot": slot, "seed": seed, "case": case})

    def _take_gpu(self, turn: ExitStack) -> None:
        """Wait for the GPU. Waiting counts as such from when the candidate could have gone on."""
        start = time.monotonic()
        self.gpu = turn.enter_context(gpu_turn(self.worker.device, self.worker.wait))
        if self.child.inbox or self.child.ended or not self.child.pending:
            self.waited_s += max(0.0, time.monotonic() - max(start, self.child.heard))

    def _keep_turn(self, turn: ExitStack) -> None:
        """The turn is this evaluation's until its end; then nothing of it is left on the GPU."""
        if turn is not self.turn:
            self.turn.push(turn.pop_all())
        self.has_turn = True
        self.turn.callback(self.worker.clear_gpu)
        self.worker.require_gpu()
        if not (self.limits.parallel_checks and self._has_room()):
            self.waited_s += self.gpu.alone()

    def _has_room(self) -> bool:
        """Does the GPU hold this evaluation beside another of its kind?"""
        self.worker.ask(self.judge, {"op": "room", "sets": self.sets})
        answer = self._judge_reply("loading the reference")
        return int(answer["free"]) > 2 * int(answer["need"])

    def _judge_reply(self, doing: str) -> dict[str, Any]:
        return self.worker.reply(self.judge, self.limits.task_s, doing)

    def _layout(self, slot: int) -> Any:
        """The inputs of a slot; the judge answers in the order of slots."""
        with self.step("inputs"):
            while slot not in self.layouts:
                self.layouts[len(self.layouts)] = self._judge_reply("preparing inputs")["inputs"]
        return self.layouts[slot]

    # -- check -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self.worker.stage = "check"
        for slot in range(self.checks):
            self._check_slot(slot)

    def _check_hidden(self) -> None:
        if Guard.HIDDEN not in self.off:
            self._check_slot(self.checks + TIMING_SLOTS, " (on inputs kept back until after timing)")

    def _check_slot(self, slot: int, note: str = "") -> None:
        layout = self._layout(slot)
        with self.step("copies"):
            ran = self._run(layout)
        self._compare(slot, ran, note)

    def _run(self, layout: Any) -> dict[str, Any]:
        """One call on fresh inputs. Its own share is what its process says, at most what passed here."""
        start = time.monotonic()
        own: float | None = None
        try:
            self.worker.ask(self.child, {"op": "run", "inputs": layout})
            ran = self.worker.reply(self.child, self.limits.check_s, "running on fresh inputs")
            own = ran["took"] if isinstance(ran.get("took"), float) else None
        finally:
            passed = time.monotonic() - start
            self.own_s += passed if own is None else min(passed, max(0.0, own))
        return ran

    def _compare(self, slot: int, ran: dict[str, Any], note: str = "") -> None:
        self._layout(self.owed - 1)  # replies of the judge come in order: take those owed first
        keys = ("outputs", "inputs", "aliases", "previous")
        if ran.get("event") != "ran" or any(key not in ran for key in keys):
            raise Ended(Status.REJECTED, "forged message: not the answer that was asked for")
        with self.step("compare"):
            self.worker.ask(self.judge, {"op": "compare", "slot": slot} | {key: ran[key] for key in keys})
            found = self._judge_reply("comparing")
        self.shown = {key: found[key] for key in ("kind", "max_abs_error", "max_rel_error") if key in found}
        if found["status"] != "ok":
            status = Status.WRONG if found["status"] == "wrong" else Status.REJECTED
            raise Ended(status, found["reason"] + note, found["reason"])

    # -- time ------------------------------------------------------------------------------------------------------

    def _time(self) -> Speedup:
        worker = self.worker
        worker.stage = "time"
        slots = list(range(self.checks, self.checks + TIMING_SLOTS))
        staged: dict[str, object] = {"op": "stage", "inputs": {str(slot): self._layout(slot) for slot in slots}}
        with self.step("copies"):
            worker.ask(self.child, staged)
            worker.reply(self.child, self.limits.check_s, "taking the timing inputs")
        before = self._gpu_state()
        self.deadline = time.monotonic() + self.limits.time_s
        first = self._block(slots)
        self.fresh = first
        self._show(slots[-1])
        count = self._repeats_for_a_block(first)
        budget = time.monotonic() + self.limits.timing_budget_s
        self.reference.clear()
        self.unseen.clear()
        self.idle.clear()
        self.goes_on.clear()
        for block in itertools.count():
            # Every slot is the last, and shown, at least once: a result kept from other contents must come to light.
            sequence = [secrets.choice(slots) for _ in range(count - 1 - secrets.randbelow(count // 2))]
            sequence.append(slots[block % len(slots)])
            times = self._block(sequence)
            self.repeats += times
            count = self._repeats_for_a_block(times)
            with self.step("interval"):
                result = speedup(self.reference, self.repeats, seed=len(self.repeats))
            enough = len(self.repeats) >= MIN_REPEATS and result.half_width <= self.limits.precision
            last = block + 1 >= MIN_BLOCKS and (enough or time.monotonic() > budget)
            if last or block < len(slots) or secrets.randbelow(4) == 0:
                self._show(sequence[-1])
            if last:
                self.last_slot = sequence[-1]
                break
        if worker.on_gpu:
            self.conditions = {"use": self.use} | conditions(before, self._gpu_state())
        self._reject_tricks()
        return result

    def _gpu_state(self) -> dict[str, Any]:
        with self.step("clocks"):
            return self.worker.gpu_state.read() if self.worker.gpu_state else {}

    def _repeats_for_a_block(self, times: list[int]) -> int:
        """As many as fill a block at the pace of these; fewer when the wall clock runs much faster than the CPU's."""
        return max(2, min(MAX_REPEATS, int(BLOCK_NS * len(times) / max(sum(times), self.wall_ns / 4, 1))))

    def _block(self, sequence: list[int]) -> list[int]:
        """The reference, then the candidate, on the same slots; both are also timed from here."""
        spent: list[int] = []
        walls: list[int] = []
        times: list[list[int]] = []
        late: list[list[int]] = []
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
            late.append(_late(answer))
        self.goes_on.append(works_on(late[1], late[0], times[1]))
        self.reference += times[0]
        around = (spent[0] - sum(times[0]), spent[1] - sum(times[1]))
        self.unseen.append((around[1] - around[0], sum(times[1])))
        self.idle.append((walls[1] - IDLE_SLACK_NS) * spent[0] > IDLE_FACTOR * spent[1] * walls[0])
        self.wall_ns, self.calls = walls[1], len(sequence)
        return times[1]

    def _show(self, slot: int) -> None:
        with self.step("copies"):
            self.worker.ask(self.child, {"op": "show"})
            shown = self.worker.reply(self.child, self.limits.check_s, "showing the last result")
        if Guard.TIMED_RESULTS not in self.off:
            self._compare(slot, shown, " (in a timed call)")

    def _reject_tricks(self) -> None:
        remembers = Guard.UNSEEN not in self.off and skips_repeats(self.fresh, self.repeats)
        if remembers and self._slow_on_unseen_again():
            raise Ended(Status.REJECTED, "it is fast only on inputs that it has seen before")
        if all(self.goes_on) and Guard.STREAMS not in self.off:
            raise Ended(
                Status.REJECTED, "the GPU works on after the call's stream is done: a stream is not joined"
            )
        slack = UNSEEN_SLACK_NS + (CALL_SLACK_NS * self.calls if self.worker.on_gpu else 0)
        hides = median(extra - UNSEEN_FACTOR * told for extra, told in self.unseen) > slack
        if hides and Guard.OUTSIDE_CLOCK not in self.off:
            raise Ended(Status.REJECTED, "it reports less time than the supervisor's clock saw")
        if all(self.idle) and Guard.IDLE not in self.off:
            raise Ended(Status.REJECTED, "it waits, or lets other processes work, while its own CPU clock stands still")

    def _slow_on_unseen_again(self) -> bool:
        """Suspected of remembering inputs: a few more sets that it can't know, each called when it is warm."""
        slots = [self.owed + extra for extra in range(ACQUITTALS)]
        known = self.checks
        for slot in slots:
            self._prepare(slot)
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


def _late(answer: dict[str, Any]) -> list[int]:
    late = answer.get("late")
    return [value for value in late if type(value) is int] if isinstance(late, list) else []


def evaluate(worker: Worker, request: dict[str, Any]) -> None:
    """Tell the verdict, then clear away what it left. Raises only PoolGone.

    An evaluation whose judge was killed is made again, once: out of memory on the host, say.
    """
    if not _evaluate(worker, request, again=False):
        _evaluate(worker, request, again=True)


def _evaluate(worker: Worker, request: dict[str, Any], *, again: bool) -> bool:
    """False, with nothing told, when it is to be made again."""
    with ExitStack() as held:
        evaluation = Evaluation(worker, request, held)
        held.callback(worker.silence_candidate)
        verdict: dict[str, object] = {
            "candidate": evaluation.candidate.hash,
            "device": worker.device,
            "sandbox": worker.level,
            "form": detect_form(evaluation.candidate.source),
        }
        try:
            result = evaluation.run()
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
            if isinstance(ended, JudgeLost) and not again:
                return False
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
            "conditions": evaluation.conditions,
        }
        worker.link.send({"job": evaluation.job, "verdict": verdict})
    return True


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
            worker.judge_placed = worker.on_gpu
            worker.ask(judge, {"op": "probe"})
            answer = worker.reply(judge, worker.limits.task_s, "running the reference")
            error = str(answer["error"]) or None
    except Ended as ended:
        error = ended.reason.removeprefix("the task's reference failed: ")
    return {"job": request["job"], "task": error}
