"""Timing: the reference's and the candidate's calls by turns, watched from outside."""

from __future__ import annotations

import itertools
import secrets
import time
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

from . import children, sandbox
from .base import Status
from .blocks import BEHIND, HEAD_STARTS, Block, Side, hiding, least_that_does, next_head_start, share_behind
from .checked import ACQUITTALS, TIMING_SLOTS, Checked
from .children import Child
from .clock import supervisor_clock
from .gpustate import conditions
from .guards import Guard
from .modules import PLACES
from .timing import HOST_RUN_TO_RUN, RUN_TO_RUN, Speedup, between, skips_repeats, speedup, stated
from .worker import Doubtful, Ended, JudgeLost, Worker

CLOCK_SETTLES_S = 0.0003
EXTRA_S = 5.0
MAX_REPEATS = 500
MIN_REPEATS = 8
MIN_BLOCKS = 3
MIN_CLEAN, CONFIRMING_BLOCKS, PAUSE_S = 2, 8, 0.02
"""Blocks of which the clocks disagree are left out and made up for; each pause is that much longer than the last."""
CALIBRATING_CALLS = 4
UNSEEN_SLACK_NS = 6_000_000
CALL_SLACK_NS = 40_000
"""The slack is a scheduler tick: another process's CPU clock is brought up to date when it blocks, else every 4 ms.
A call's slack, on a GPU: a launch from Python takes that long on the host, hidden behind the flush of the L2."""


class Pace(NamedTuple):
    """How long a block of calls takes.

    block_ns: of timed calls.  wall_share: so many nanoseconds of the wall clock fill as much of a block as a timed one,
    since short kernels' blocks are mostly flushes of the L2.  slack_ns: see UNSEEN_SLACK_NS.
    apart: the reference, which is mostly the slower one, is called as often as fills a block of its own. Not on a CPU:
    what the harness takes around a call is scaled then, and with it the ticks of another process's CPU clock.
    """

    block_ns: int
    wall_share: int
    slack_ns: int
    apart: bool


ON_CPU = Pace(40_000_000, 4, UNSEEN_SLACK_NS, apart=False)
ON_GPU = Pace(20_000_000, 2, UNSEEN_SLACK_NS // 2, apart=True)
"""A GPU's clocks are events and the wall clock: finer, so blocks are shorter, and the GPU is free sooner."""


class Timed(Checked):
    """The last stage of one candidate; raises Ended when it ends there."""

    def __init__(self, worker: Worker, request: dict[str, Any], held: ExitStack) -> None:
        super().__init__(worker, request, held)
        self.fresh: list[int] = []
        self.blocks: list[Block] = []
        self.head_start = 0
        self.lent = bool(request.get("lent"))  # the device's memory, to the KV tier
        self.use = "turn"
        self.pace = ON_GPU if worker.on_gpu else ON_CPU
        self.reference_repeats = MAX_REPEATS
        self.extra_ms: dict[str, float] = {}
        self.conditions: dict[str, Any] = {}

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
        self.fresh = first.candidate.told
        self._show(slots[-1])
        if worker.on_gpu:
            first = self._find_head_start(slots, first)
        self._measure(slots, self._repeats_for_a_block(first.candidate))
        self._reject_tricks(slots)
        if worker.on_gpu or self.lent:
            self.conditions = {"use": self.use} | conditions(before, self._gpu_state())
        return self._told()

    def _measure(self, slots: list[int], count: int) -> None:
        """Blocks, each elsewhere in memory, until the interval is small or the budget ends."""
        budget = time.monotonic() + self.limits.timing_budget_s
        for number in itertools.count():
            block = self._measured_block(slots, count)
            count = self._repeats_for_a_block(block.candidate)
            with self.step("interval"):
                result, places = self._figure(self.blocks)
            calls = sum(len(block.candidate.told) for block in self.blocks)
            enough = calls >= MIN_REPEATS and max(result.half_width, places) <= self.limits.precision
            last = number + 1 >= MIN_BLOCKS and (enough or time.monotonic() > budget)
            if last or number < len(slots) or secrets.randbelow(4) == 0:
                self._show(self.last_slot)
            if last:
                return

    def _measured_block(self, slots: list[int], count: int) -> Block:
        """The last call has other contents than the one before, so that a result of those must come to light."""
        number = len(self.blocks)
        if number:
            self._place_anew(slots[0])
        self.last_slot = slots[number % len(slots)]
        sequence = [secrets.choice(slots) for _ in range(count - 2 - secrets.randbelow(count // 2))]
        block = self._block([*sequence, slots[(number + 1) % len(slots)], self.last_slot])
        self.blocks.append(block)
        return block

    def _place_anew(self, slot: int) -> None:
        """The timed calls' inputs lie elsewhere from now on, in both processes; memory makes a part of the time."""
        with self.own():
            for child in (self.judge, self.child):
                self.worker.ask(child, {"op": "anew", "slot": slot})
                self.worker.reply(child, self.limits.check_s, "calling it elsewhere in memory")

    def _find_head_start(self, slots: list[int], first: Block) -> Block:
        """As long as the slower host needs to launch a call, the same for both sides; what it was tried with."""
        tried: dict[int, Block] = {}
        wanted: int | None = HEAD_STARTS[0]
        while wanted is not None:
            self.head_start = wanted
            tried[wanted] = first = self._block([slots[number % len(slots)] for number in range(CALIBRATING_CALLS)])
            wanted = next_head_start(first, wanted)
        self.head_start = least_that_does(tried)
        return tried[self.head_start]

    def _figure(self, blocks: list[Block]) -> tuple[Speedup, float]:
        """The speed-up over blocks, and half its interval by the places in memory."""
        reference = [ns for block in blocks for ns in block.reference.told]
        candidate = [ns for block in blocks for ns in block.candidate.told]
        places = between([block.ratio for block in blocks], PLACES)
        return speedup(reference, candidate, seed=len(candidate)), places

    def _told(self) -> Speedup:
        """What the verdict says; a side that waits for the host has the host's scatter."""
        behind = {
            "reference": share_behind([block.reference for block in self.blocks]),
            "candidate": share_behind([block.candidate for block in self.blocks]),
        }
        if self.worker.on_gpu:
            self.conditions |= {"host_behind": behind, "head_start_cycles": self.head_start}
        waits = max(behind.values()) > BEHIND
        result, places = self._figure(self.blocks)
        return stated(result, places, HOST_RUN_TO_RUN if waits else RUN_TO_RUN)

    def _gpu_state(self) -> dict[str, Any]:
        with self.step("clocks"):
            return self.worker.gpu_state.read() if self.worker.gpu_state else {}

    def _repeats_for_a_block(self, side: Side) -> int:
        """As many as fill a block at the pace of these; fewer when the wall clock runs much faster than theirs."""
        spent = max(sum(side.told), side.wall / self.pace.wall_share, 1)
        return max(2, min(MAX_REPEATS, int(self.pace.block_ns * len(side.told) / spent)))

    def _block(self, candidate_sequence: list[int]) -> Block:
        """The reference, then the candidate, on the same slots; both are also timed from here."""
        reference = self._side(self.judge, candidate_sequence[-self.reference_repeats :], "timing the reference")
        candidate = self._side(self.child, candidate_sequence, "timing")
        if self.pace.apart:
            self.reference_repeats = max(MIN_REPEATS, self._repeats_for_a_block(reference))
        return Block(reference, candidate)

    def _side(self, child: Child, sequence: list[int], doing: str) -> Side:
        runs_code = children.innermost(child.pid, sandbox.around(self.worker.level))
        now = supervisor_clock(self.worker.device, self.limits.threads, runs_code)
        start, began = now(), time.perf_counter_ns()
        self.worker.ask(child, {"op": "time", "sequence": sequence, "head_start": self.head_start})
        left = max(0.1, self.deadline - time.monotonic())
        answer = self.worker.reply(child, left, doing)
        wall = time.perf_counter_ns() - began
        self.own_s += wall / 1e9
        if not self.worker.on_gpu:
            time.sleep(CLOCK_SETTLES_S)
        spent = now() - start
        return Side(_times(child, answer, len(sequence), spent), spent, wall, _late(answer), _behind(answer))

    def _show(self, slot: int) -> None:
        with self.step("copies"):
            self.worker.ask(self.child, {"op": "show"})
            shown = self.worker.reply(self.child, self.limits.check_s, "showing the last result")
        if Guard.TIMED_RESULTS not in self.off:
            self._compare(slot, shown, " (in a timed call)")

    def _reject_tricks(self, slots: list[int]) -> None:
        repeats = [ns for block in self.blocks for ns in block.candidate.told]
        remembers = Guard.UNSEEN not in self.off and skips_repeats(self.fresh, repeats)
        if remembers and self._slow_on_unseen_again(repeats):
            raise Ended(Status.REJECTED, "it is fast only on inputs that it has seen before")
        pause = 0.0
        for _ in range(CONFIRMING_BLOCKS):
            if not self._suspicion():
                break
            pause += PAUSE_S  # what loads the host may be gone by then
            time.sleep(pause)
            self._measured_block(slots, self._repeats_for_a_block(self.blocks[-1].candidate))
            self._show(self.last_slot)
        if reason := self._suspicion():
            raise Doubtful(Status.REJECTED, reason)
        self.blocks = self._clean() or self.blocks

    def _hiding(self) -> list[bool]:
        if Guard.OUTSIDE_CLOCK in self.off:
            return [False] * len(self.blocks)
        return hiding(self.blocks, self.pace.slack_ns, CALL_SLACK_NS if self.worker.on_gpu else 0)

    def _clean(self) -> list[Block]:
        """Blocks of which all clocks agree: with too few of them, only these make the figure."""
        streams = Guard.STREAMS not in self.off
        pairs = zip(self.blocks, self._hiding(), strict=True)
        return [block for block, hides in pairs if not (hides or (streams and block.goes_on))]

    def _suspicion(self) -> str:
        """Why the candidate would be rejected if it stayed at these blocks, or ""."""
        if len(self._clean()) < MIN_CLEAN:
            if any(self._hiding()):
                return "it reports less time than the supervisor's clock saw"
            return "the GPU works on after the call's stream is done: a stream is not joined"
        if all(block.idle for block in self.blocks) and Guard.IDLE not in self.off:
            return "it waits, or lets other processes work, while its own CPU clock stands still"
        return ""

    def _slow_on_unseen_again(self, repeats: list[int]) -> bool:
        """Suspected of remembering inputs: a few more sets that it can't know, each called when it is warm."""
        slots = [self.owed + extra for extra in range(ACQUITTALS)]
        known = self.checks
        for slot in slots:
            self._prepare(slot)
        self.worker.ask(self.child, {"op": "stage", "inputs": {str(slot): self._layout(slot) for slot in slots}})
        self.worker.reply(self.child, self.limits.check_s, "taking the timing inputs")
        self.deadline = time.monotonic() + self.limits.time_s
        fresh = [self._block([known, known, slot]).candidate.told[2] for slot in slots]
        return skips_repeats(fresh, repeats)

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


def _times(child: Child, answer: dict[str, Any], count: int, spent_ns: int) -> list[int]:
    """The times of an answer; a candidate that reports impossible ones is rejected."""
    times = answer.get("ns")
    if (
        not isinstance(times, list)
        or len(times) != count
        or not all(type(value) is int and value > 0 for value in times)
        or sum(times) > spent_ns * 1.05 + UNSEEN_SLACK_NS
    ):
        if child.kind == "judge":  # killed after its answer, its CPU clock is gone: no fault of the candidate's
            raise JudgeLost(Status.RUNTIME_ERROR, "the task's reference failed: its times are impossible")
        raise Ended(Status.REJECTED, "forged message: the times of the candidate are impossible")
    return times


def _late(answer: dict[str, Any]) -> list[int]:
    late = answer.get("late")
    return [value for value in late if type(value) is int] if isinstance(late, list) else []


def _behind(answer: dict[str, Any]) -> int:
    behind = answer.get("behind")
    return behind if type(behind) is int else 0
