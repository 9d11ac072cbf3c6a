"""How often reference and candidate are called in a block, and the interval that is told."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.evaluation import timed
from specgen_engine.evaluation.sandbox import PROCESS
from specgen_engine.evaluation.timed import MIN_REPEATS, ON_CPU, ON_GPU, Pace, Timed
from specgen_engine.evaluation.timing import RUN_TO_RUN, Speedup, stated

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
    monkeypatch: pytest.MonkeyPatch, pace: Pace, lie: float = 1.0, ns: int = CANDIDATE_NS
) -> tuple[Timed, list[tuple[str, int]]]:
    """A Timed whose judge and candidate answer at fixed speeds; the candidate tells 1/lie of its time. And what was
    asked: (who, calls)."""
    clock, asked = FakeClock(), []
    judge = SimpleNamespace(pid=1, kind="judge", ns=REFERENCE_NS, lie=1.0)
    child = SimpleNamespace(pid=2, kind="candidate", ns=ns, lie=lie)

    def reply(who: Any, *_: object) -> dict[str, Any]:
        count = asked[-1][1]
        clock.now += count * (who.ns + AROUND_NS)
        return {"ns": [int(who.ns / who.lie)] * count}

    worker = SimpleNamespace(
        device="cuda:0",
        on_gpu=True,
        level=PROCESS,
        limits=SimpleNamespace(threads=1),
        ask=lambda who, message: asked.append((who.kind, len(message["sequence"]))),
        reply=reply,
    )
    monkeypatch.setattr(timed, "time", clock)
    monkeypatch.setattr(timed, "supervisor_clock", lambda *_: clock.perf_counter_ns)
    self = object.__new__(Timed)
    self.worker, self.judge, self.child, self.pace, self.off = worker, judge, child, pace, frozenset()  # type: ignore
    self.limits = worker.limits
    self.deadline, self.own_s, self.reference_repeats, self.fresh = time.monotonic() + 60, 0.0, timed.MAX_REPEATS, []
    self.reference, self.repeats, self.unseen, self.idle, self.goes_on = [], [], [], [], []
    return self, asked


def blocks_of(self: Timed, count: int = 3) -> None:
    repeats = self._repeats_for_a_block(self._block([2, 3]), self.walls[1])
    for kept in (self.unseen, self.idle, self.goes_on):
        kept.clear()
    for _ in range(count):
        times = self._block([2] * repeats)
        repeats = self._repeats_for_a_block(times, self.walls[1])


def test_a_slow_reference_is_called_less_often_than_a_fast_candidate_on_a_gpu(monkeypatch) -> None:
    self, asked = a_timing(monkeypatch, ON_GPU)
    blocks_of(self)
    calls = {kind: [count for who, count in asked[2:] if who == kind] for kind in ("judge", "candidate")}
    assert calls["judge"] == [MIN_REPEATS] * 3  # 56 ms each; as often as the candidate it would be 1.1 s
    assert min(calls["candidate"]) > 100


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


def test_the_interval_told_holds_what_a_second_run_differs_by() -> None:
    narrow = stated(Speedup(2.0, 1.999, 2.002, 2.0, 1.0))
    assert narrow.low == pytest.approx(2.0 * (1 - RUN_TO_RUN), rel=1e-3)
    assert narrow.high == pytest.approx(2.0 * (1 + RUN_TO_RUN), rel=1e-3)
    wide = stated(Speedup(2.0, 1.6, 2.4, 2.0, 1.0))
    assert (wide.low, wide.high) == pytest.approx((1.6, 2.4), rel=1e-3)
    assert wide.low <= 1.6
    assert wide.high >= 2.4
