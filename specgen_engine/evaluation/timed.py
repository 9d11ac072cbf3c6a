"""Timing: the reference's and the candidate's calls by turns, watched from outside."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple, TypeGuard

from . import children, sandbox
from .base import Status
from .checked import ACQUITTALS, TIMING_SLOTS, Checked
from .children import Child
from .clock import supervisor_clock, waited_for_cpu
from .gpustate import conditions
from .guards import Guard
from .timing import Round, Speedup, floor_of, is_enough, skips_repeats, speedup, undisturbed, warning, works_on
from .worker import Ended, Lost, Worker

CLOCK_SETTLES_S = 0.0003
SIDES = ("reference", "candidate")
EXTRA_S = 5.0
MAX_REPEATS = 500
MIN_REPEATS = 5
CALMER_S = 0.25
"""Before blocks that are to confirm a suspicion: what loaded the host for a moment may be gone."""
IDLE_FACTOR, IDLE_SLACK_NS = 3, 10_000_000
"""Wall time beyond the reference's own share of waiting, at which CPU time is no measure of a candidate's work."""
UNSEEN_FACTOR, UNSEEN_SLACK_NS = 0.5, 6_000_000
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


ON_CPU = Pace(24_000_000, 4, UNSEEN_SLACK_NS, apart=False)
ON_GPU = Pace(12_000_000, 2, UNSEEN_SLACK_NS // 2, apart=True)
"""A GPU's clocks are events and the wall clock: finer, so blocks are shorter, and the GPU is free sooner."""


class Timed(Checked):
    """The last stage of one candidate; raises Ended when it ends there."""

    def __init__(self, worker: Worker, request: dict[str, Any], held: ExitStack) -> None:
        super().__init__(worker, request, held)
        self.fresh: list[int] = []
        self.repeats: list[int] = []
        self.rounds: list[Round] = []
        self.behind: list[tuple[float, float]] = []  # see timing.floor_of
        self.cpu_wait: list[tuple[float | None, float | None]] = []  # of each round, see timing.warning
        self.unseen: list[tuple[int, int]] = []
        self.idle: list[bool] = []
        self.goes_on: list[bool] = []
        self.asked_again = ""  # the suspicion that a second series of blocks was to confirm
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
        self.fresh = first
        self._show(slots[-1])
        began = time.monotonic()
        result = self._measure(slots, self._repeats_for_a_block(first, self.walls[1]))
        took = time.monotonic() - began
        self.asked_again = self._disagreement()
        if self.asked_again and time.monotonic() + CALMER_S + took < self.deadline:
            self._let_calm_down()
            result = self._measure(slots, self._repeats_for_a_block(self.repeats[-self.calls :], self.walls[1]))
        if worker.on_gpu or self.lent:
            self.conditions = {"use": self.use} | conditions(before, self._gpu_state())
        self.conditions |= self._of_the_host(result)
        self.conditions["rounds_ms"] = [[median(side) / 1e6 for side in one] for one in self.rounds]
        if self.asked_again:
            self.conditions["asked_again"] = self.asked_again
        self._reject_tricks()
        return result

    def _measure(self, slots: list[int], count: int) -> Speedup:
        """Blocks until the interval is small or the budget ends; these alone make the figure. count: of the first."""
        budget = time.monotonic() + self.limits.timing_budget_s
        for kept in (self.rounds, self.behind, self.cpu_wait, self.repeats, self.unseen, self.idle, self.goes_on):
            kept.clear()
        block = 0
        while True:
            # A result kept from an earlier call at this round's addresses, or from any round, must come to light:
            # the contents of the last call, whose result is shown, are none of the calls' before in the round.
            last = slots[block % len(slots)]
            others = [slot for slot in slots if slot != last]
            sequence = [secrets.choice(others) for _ in range(count - secrets.randbelow(count // 2))] + [last]
            times = self._block(sequence, moved=True)
            self.repeats += self.rounds[-1].candidate
            count = self._repeats_for_a_block(times, self.walls[1])
            with self.step("interval"):
                rounds = undisturbed(self.rounds, self.behind)
                result = speedup(rounds)
            done = is_enough(result, len(rounds), self.limits.precision, over=time.monotonic() > budget)
            if done or block < len(slots) or secrets.randbelow(4) == 0:
                self._show(last)
            if done:
                self.last_slot = last
                return speedup(rounds, floor_of(self.behind))
            block += 1

    def _of_the_host(self, result: Speedup) -> dict[str, Any]:
        """In how many calls it came late, how long it had no CPU, and what that means for the figure."""
        behind, cpu_wait = _by_side(self.behind), _by_side(self.cpu_wait)
        told: dict[str, Any] = {"host_behind": behind, "cpu_wait": cpu_wait} if self.worker.on_gpu else {}
        if left_out := len(self.rounds) - len(undisturbed(self.rounds, self.behind)):
            told["rounds_left_out"] = left_out
        if warned := warning(result, behind, cpu_wait):
            told["warning"] = warned
        return told

    def _let_calm_down(self) -> None:
        end = time.monotonic() + CALMER_S
        while (left := end - time.monotonic()) > 0:
            self.worker.wait(left)

    def _gpu_state(self) -> dict[str, Any]:
        with self.step("clocks"):
            return self.worker.gpu_state.read() if self.worker.gpu_state else {}

    def _repeats_for_a_block(self, times: list[int], wall_ns: int) -> int:
        """As many as fill a block at the pace of these; fewer when the wall clock runs much faster than theirs."""
        spent = max(sum(times), wall_ns / self.pace.wall_share, 1)
        return max(2, min(MAX_REPEATS, int(self.pace.block_ns * len(times) / spent)))

    def _block(self, candidate_sequence: list[int], *, moved: bool = False) -> list[int]:
        """The reference, then the candidate, on the same slots; both are also timed from here.

        moved: a round of the figure, elsewhere in memory than the one before; the first call there is not counted.
        """
        spent: list[int] = []
        walls: list[int] = []
        times: list[list[int]] = []
        late: list[list[int]] = []
        behind: list[float] = []
        cpu_wait: list[float | None] = []
        sequences = (candidate_sequence[-self.reference_repeats - moved :], candidate_sequence)
        roles = ((self.judge, "timing the reference"), (self.child, "timing"))
        for sequence, (child, doing) in zip(sequences, roles, strict=True):
            runs_code = children.innermost(child.pid, sandbox.around(self.worker.level))
            now = supervisor_clock(self.worker.device, self.limits.threads, runs_code)
            start, began, waited = now(), time.perf_counter_ns(), waited_for_cpu(runs_code)
            self.worker.ask(child, {"op": "time", "sequence": sequence, "moved": moved})
            left = max(0.1, self.deadline - time.monotonic())
            answer = self.worker.reply(child, left, doing)
            walls.append(time.perf_counter_ns() - began)
            self.own_s += walls[-1] / 1e9
            after = waited_for_cpu(runs_code)
            cpu_wait.append(None if waited is None or after is None else (after - waited) / walls[-1])
            if not self.worker.on_gpu:
                time.sleep(CLOCK_SETTLES_S)
            spent.append(now() - start)
            times.append(self._times_in(answer, child, len(sequence), spent[-1]))
            late.append(_late(answer))
            behind.append(_behind(answer) / len(sequence))
        self.goes_on.append(works_on(late[1], late[0], times[1]))
        if moved:
            self.rounds.append(Round(times[0][1:], times[1][1:]))
            self.behind.append((behind[0], behind[1]))
            self.cpu_wait.append((cpu_wait[0], cpu_wait[1]))
        around = (spent[0] - sum(times[0])) * len(times[1]) // len(times[0]), spent[1] - sum(times[1])
        self.unseen.append((around[1] - around[0], sum(times[1])))
        self.idle.append((walls[1] - IDLE_SLACK_NS) * spent[0] > IDLE_FACTOR * spent[1] * walls[0])
        self.walls, self.calls = walls, len(times[1])
        if self.pace.apart:
            self.reference_repeats = max(MIN_REPEATS, self._repeats_for_a_block(times[0], walls[0]))
        return times[1]

    def _times_in(self, answer: dict[str, Any], child: Child, count: int, spent_ns: int) -> list[int]:
        """The times of an answer. A candidate that reports impossible ones is rejected.

        Who was killed after its answer has no CPU clock any more, with which times would be possible.
        """
        times = answer.get("ns")
        if _possible(times, count, spent_ns):
            return times
        if lost := self.worker.end_of(child, "showing its times"):
            raise lost
        if child.kind == "judge":
            raise Lost(Status.RUNTIME_ERROR, "the task's reference failed: its times are impossible")
        raise Ended(Status.REJECTED, "forged message: the times of the candidate are impossible")

    def _show(self, slot: int) -> None:
        with self.step("copies"):
            self.worker.ask(self.child, {"op": "show"})
            shown = self.worker.reply(self.child, self.limits.check_s, "showing the last result")
        if Guard.TIMED_RESULTS not in self.off:
            self._compare(slot, shown, " (in a timed call)")

    def _disagreement(self) -> str:
        """Of which the clocks speak against the candidate, or "". A busy host can cause each of these once."""
        if all(self.goes_on) and Guard.STREAMS not in self.off:
            return "the GPU works on after the call's stream is done: a stream is not joined"
        slack = self.pace.slack_ns + (CALL_SLACK_NS * self.calls if self.worker.on_gpu else 0)
        hides = median(extra - UNSEEN_FACTOR * told for extra, told in self.unseen) > slack
        if hides and Guard.OUTSIDE_CLOCK not in self.off:
            return "it reports less time than the supervisor's clock saw"
        if all(self.idle) and Guard.IDLE not in self.off:
            return "it waits, or lets other processes work, while its own CPU clock stands still"
        return ""

    def _reject_tricks(self) -> None:
        suspicion = self._disagreement()
        remembers = Guard.UNSEEN not in self.off and skips_repeats(self.fresh, self.repeats)
        if remembers and self._slow_on_unseen_again():
            raise Ended(Status.REJECTED, "it is fast only on inputs that it has seen before")
        if suspicion:
            raise Ended(Status.REJECTED, suspicion)

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


def _possible(times: Any, count: int, spent_ns: int) -> TypeGuard[list[int]]:
    return (
        isinstance(times, list)
        and len(times) == count
        and all(type(value) is int and value > 0 for value in times)
        and sum(times) <= spent_ns * 1.05 + UNSEEN_SLACK_NS
    )


def _by_side(rounds: Sequence[tuple[float | None, float | None]]) -> dict[str, float]:
    """Medians over rounds; a side of which nothing is known is left out."""
    known = {
        side: [one for one in of if one is not None] for side, of in zip(SIDES, zip(*rounds, strict=True), strict=True)
    }
    return {side: round(median(of), 3) for side, of in known.items() if of}


def _late(answer: dict[str, Any]) -> list[int]:
    late = answer.get("late")
    return [value for value in late if type(value) is int] if isinstance(late, list) else []


def _behind(answer: dict[str, Any]) -> int:
    behind = answer.get("behind")
    return max(0, behind) if type(behind) is int else 0
