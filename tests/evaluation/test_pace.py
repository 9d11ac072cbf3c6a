"""How often reference and candidate are called in a block, and what is timed again."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.evaluation import timed
from specgen_engine.evaluation.sandbox import PROCESS
from specgen_engine.evaluation.timed import MIN_REPEATS, ON_CPU, ON_GPU, Pace, Timed
from specgen_engine.evaluation.timing import MIN_ROUNDS

REFERENCE_NS, CANDIDATE_NS, AROUND_NS = 7_000_000, 100_000, 150_000


class FakeClock:
    """Advances by what the process that is asked would take: its calls, and what the harness does around each."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now

    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(lambda seconds: None)


def a_timing(
    monkeypatch: pytest.MonkeyPatch,
    pace: Pace,
    lie: float = 1.0,
    ns: int = CANDIDATE_NS,
    load_ns: Callable[[], int] = lambda: 0,
) -> tuple[Timed, list[tuple[str, int]]]:
    """A Timed whose judge and candidate answer at fixed speeds; the candidate tells 1/lie of its time. And what was
    asked: (who, calls). load_ns(): what others' load on the host adds to a block of the candidate's."""
    clock, asked = FakeClock(), []
    judge = SimpleNamespace(pid=1, kind="judge", ns=REFERENCE_NS, lie=1.0)
    child = SimpleNamespace(pid=2, kind="candidate", ns=ns, lie=lie)

    def reply(who: Any, *_: object) -> dict[str, Any]:
        count = asked[-1][1]
        clock.now += count * (who.ns + AROUND_NS) + (load_ns() if who is child else 0)
        return {"ns": [int(who.ns / who.lie)] * count}

    worker = SimpleNamespace(
        device="cuda:0",
        on_gpu=True,
        level=PROCESS,
        limits=SimpleNamespace(threads=1, check_s=3, time_s=10, timing_budget_s=5, precision=0.03),
        gpu_state=None,
        ask=lambda who, message: asked.append((who.kind, len(message["sequence"]))) if "sequence" in message else None,
        reply=lambda who, *rest: reply(who, *rest) if asked else {},
        wait=time.sleep,
    )
    monkeypatch.setattr(timed, "time", clock)
    monkeypatch.setattr(timed, "supervisor_clock", lambda *_: clock.perf_counter_ns)
    self = object.__new__(Timed)
    self.worker, self.judge, self.child, self.pace, self.off = worker, judge, child, pace, frozenset()  # type: ignore
    self.limits = worker.limits
    self.deadline, self.own_s, self.reference_repeats, self.fresh = time.monotonic() + 60, 0.0, timed.MAX_REPEATS, []
    self.rounds, self.behind, self.cpu_wait, self.repeats, self.unseen = [], [], [], [], []
    self.idle, self.goes_on = [], []
    self.checks, self.lent, self.use, self.conditions, self.asked_again = 2, False, "turn", {}, ""
    self.stages, self.steps, self.waited_s = {}, {}, 0.0
    self._layout = self._show = lambda slot: None  # type: ignore[method-assign]
    return self, asked


def blocks_of(self: Timed, count: int = 3) -> None:
    repeats = self._repeats_for_a_block(self._block([2, 3]), self.walls[1])
    for kept in (self.unseen, self.idle, self.goes_on):
        kept.clear()
    for _ in range(count):
        times = self._block([2] * (1 + repeats), moved=True)
        repeats = self._repeats_for_a_block(times, self.walls[1])


def test_a_slow_reference_is_called_less_often_than_a_fast_candidate_on_a_gpu(monkeypatch) -> None:
    self, asked = a_timing(monkeypatch, ON_GPU)
    blocks_of(self)
    calls = {kind: [count for who, count in asked[2:] if who == kind] for kind in ("judge", "candidate")}
    assert calls["judge"] == [MIN_REPEATS + 1] * 3  # 42 ms each; as often as the candidate it would be 0.6 s
    assert min(calls["candidate"]) > 60
    assert [len(one.reference) for one in self.rounds] == [MIN_REPEATS] * 3  # the first at a new place doesn't count


def test_the_call_that_is_shown_has_contents_of_no_other_call_of_its_round(monkeypatch) -> None:
    self, _ = a_timing(monkeypatch, ON_CPU)
    sequences: list[list[int]] = []
    ask = self.worker.ask

    def asks(who: Any, message: dict[str, Any]) -> None:
        if who is self.child and message.get("moved"):
            sequences.append(message["sequence"])
        ask(who, message)

    self.worker.ask = asks  # type: ignore[method-assign]
    self._time()
    assert len(sequences) >= MIN_ROUNDS
    assert all(sequence[-1] not in sequence[:-1] for sequence in sequences)
    assert all(len(sequence) > 2 for sequence in sequences)
    assert {sequence[-1] for sequence in sequences} == {2, 3}


def test_both_are_called_as_often_on_a_cpu(monkeypatch) -> None:
    self, asked = a_timing(monkeypatch, ON_CPU)
    blocks_of(self)
    assert [count for who, count in asked if who == "judge"] == [count for who, count in asked if who == "candidate"]


@pytest.mark.parametrize("pace", [ON_CPU, ON_GPU])
def test_an_honest_candidate_passes_and_one_that_tells_less_than_half_does_not(monkeypatch, pace: Pace) -> None:
    honest, _ = a_timing(monkeypatch, pace)
    blocks_of(honest)
    honest._reject_tricks()
    liar, _ = a_timing(monkeypatch, pace, lie=2.5, ns=1_000_000)
    blocks_of(liar)
    with pytest.raises(timed.Ended, match="less time than the supervisor's clock saw"):
        liar._reject_tricks()


def blocks_asked(asked: list[tuple[str, int]]) -> int:
    return sum(who == "candidate" for who, _ in asked)


FIRST_SERIES = 1 + MIN_ROUNDS
"""Blocks of a candidate that nothing speaks against: the first call on each slot, and the measured ones."""


@pytest.mark.parametrize("pace", [ON_CPU, ON_GPU])
def test_nobody_is_asked_again_without_a_reason(monkeypatch, pace: Pace) -> None:
    honest, asked = a_timing(monkeypatch, pace)
    assert honest._time().candidate_ms == pytest.approx(CANDIDATE_NS / 1e6)
    assert blocks_asked(asked) == FIRST_SERIES
    assert "asked_again" not in honest.conditions


@pytest.mark.parametrize("pace", [ON_CPU, ON_GPU])
def test_a_load_that_passes_condemns_nobody_and_its_blocks_are_left_out(monkeypatch, pace: Pace) -> None:
    loaded, _ = a_timing(monkeypatch, pace, load_ns=lambda: 0 if loaded.asked_again else 90_000_000)
    loaded._time()
    assert len(loaded.unseen) == MIN_ROUNDS
    assert max(extra for extra, _ in loaded.unseen) < 90_000_000
    assert "less time than" in loaded.conditions["asked_again"]


@pytest.mark.parametrize("pace", [ON_CPU, ON_GPU])
def test_a_liar_is_asked_once_more_and_rejected(monkeypatch, pace: Pace) -> None:
    liar, asked = a_timing(monkeypatch, pace, lie=2.5, ns=1_000_000)
    with pytest.raises(timed.Ended, match="less time than the supervisor's clock saw"):
        liar._time()
    assert blocks_asked(asked) == FIRST_SERIES + MIN_ROUNDS


def behind_in(monkeypatch: pytest.MonkeyPatch, rounds: set[int]) -> Timed:
    """A timing after these rounds of whose candidate's blocks the host came late in all calls, which took longer."""
    self, asked = a_timing(monkeypatch, ON_GPU)
    reply = self.worker.reply

    def answers(who: Any, *rest: object) -> dict[str, Any]:
        said = reply(who, *rest)
        if who is self.child and "ns" in said and blocks_asked(asked) - 2 in rounds:
            return {"ns": [2 * ns for ns in said["ns"]], "behind": len(said["ns"])}
        return said

    self.worker.reply = answers  # type: ignore[method-assign]
    self._time()
    return self


def test_a_round_in_which_the_host_came_late_is_no_part_of_the_figure(monkeypatch) -> None:
    self = behind_in(monkeypatch, {2})
    assert len(self.rounds) == MIN_ROUNDS + 1
    assert self.conditions["rounds_left_out"] == 1
    assert self.conditions["host_behind"] == {"reference": 0.0, "candidate": 0.0}
    assert "warning" not in self.conditions


def test_a_figure_of_which_the_host_decides_comes_with_a_warning(monkeypatch) -> None:
    monkeypatch.setattr(timed, "waited_for_cpu", lambda pid: 0)
    self = behind_in(monkeypatch, set(range(500)))
    assert self.conditions["host_behind"] == {"reference": 0.0, "candidate": 1.0}
    assert self.conditions["cpu_wait"] == {"reference": 0.0, "candidate": 0.0}
    told = "known within 82% only: the GPU waits for the host in the calls of the candidate"
    assert self.conditions["warning"] == f"{told} (0% of the time spent waiting for a CPU)"


def test_a_liar_who_is_honest_when_asked_again_has_the_honest_figure(monkeypatch) -> None:
    turned, asked = a_timing(monkeypatch, ON_GPU, ns=1_000_000)
    reply = turned.worker.reply

    def answers(who: Any, *rest: object) -> dict[str, Any]:
        said = reply(who, *rest)
        lies = who is turned.child and blocks_asked(asked) <= FIRST_SERIES
        return {"ns": [ns // 4 for ns in said["ns"]]} if lies and "ns" in said else said

    turned.worker.reply = answers  # type: ignore[method-assign]
    assert turned._time().candidate_ms == pytest.approx(1.0)
    assert set(turned.repeats) == {1_000_000}


def test_without_time_for_a_second_series_the_first_decides(monkeypatch) -> None:
    liar, asked = a_timing(monkeypatch, ON_GPU, lie=2.5, ns=1_000_000)
    liar.limits.time_s = timed.CALMER_S / 2
    with pytest.raises(timed.Ended, match="less time than the supervisor's clock saw"):
        liar._time()
    assert blocks_asked(asked) == FIRST_SERIES
