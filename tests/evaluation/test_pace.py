"""How often reference and candidate are called in a block, and the interval that is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.evaluation import timed
from specgen_engine.evaluation.blocks import HEAD_STARTS, Block, Side, least_that_does, next_head_start
from specgen_engine.evaluation.processes import Doubtful
from specgen_engine.evaluation.sandbox import PROCESS
from specgen_engine.evaluation.timed import MIN_CLEAN, MIN_REPEATS, ON_CPU, ON_GPU, Pace, Timed
from specgen_engine.evaluation.timing import RUN_TO_RUN, Speedup, between, stated

SLOTS = [2, 3]
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
    load_ns: Callable[[int], int] = lambda number: 0,
) -> tuple[Timed, list[tuple[str, int]]]:
    """A Timed whose judge and candidate answer at fixed speeds; the candidate tells 1/lie of its time. And what was
    asked: (who, calls). load_ns(number): what others' load on the host adds to the candidate's nth block of calls."""
    clock, asked = FakeClock(), []
    judge = SimpleNamespace(pid=1, kind="judge", ns=REFERENCE_NS, lie=1.0)
    child = SimpleNamespace(pid=2, kind="candidate", ns=ns, lie=lie)

    def reply(who: Any, *_: object) -> dict[str, Any]:
        count = asked[-1][1]
        blocks = sum(kind == "candidate" for kind, _ in asked)
        clock.now += count * (who.ns + AROUND_NS) + (load_ns(blocks) if who is child else 0)
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
    self.blocks, self.head_start = [], 0
    self._place_anew = self._show = lambda slot: None  # type: ignore[method-assign]
    return self, asked


def blocks_of(self: Timed, count: int = 3) -> None:
    block = self._block([2, 3])
    for _ in range(count):
        block = self._measured_block(SLOTS, self._repeats_for_a_block(block.candidate))


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
    honest._reject_tricks(SLOTS)
    liar, _ = a_timing(monkeypatch, pace, lie=2.5, ns=1_000_000)
    blocks_of(liar)
    with pytest.raises(timed.Ended, match="less time than the supervisor's clock saw"):
        liar._reject_tricks(SLOTS)


@pytest.mark.parametrize("pace", [ON_CPU, ON_GPU])
def test_a_load_that_comes_and_goes_condemns_nobody_and_its_blocks_are_left_out(monkeypatch, pace: Pace) -> None:
    loaded, asked = a_timing(monkeypatch, pace, load_ns=lambda number: 0 if number % 4 == 0 else 90_000_000)
    blocks_of(loaded)
    loaded._reject_tricks(SLOTS)
    assert len(loaded.blocks) == MIN_CLEAN
    assert sum(who == "candidate" for who, _ in asked) == 8  # the first, three measured, and until two were clean


def test_what_lies_in_most_blocks_has_only_the_figure_of_the_others(monkeypatch) -> None:
    sometimes, _ = a_timing(monkeypatch, ON_GPU, ns=1_000_000)
    blocks_of(sometimes)
    honest = sometimes.blocks[0]
    told = [ns // 4 for ns in honest.candidate.told]
    liar = honest._replace(candidate=honest.candidate._replace(told=told))
    sometimes.blocks = [liar, honest, liar, liar, honest]
    sometimes._reject_tricks(SLOTS)
    assert sometimes.blocks == [honest, honest]


def test_always_under_suspicion_is_made_again_before_it_is_rejected(monkeypatch) -> None:
    liar, asked = a_timing(monkeypatch, ON_GPU, lie=2.5, ns=1_000_000)
    blocks_of(liar)
    with pytest.raises(Doubtful):
        liar._reject_tricks(SLOTS)
    assert sum(who == "candidate" for who, _ in asked) == 4 + timed.CONFIRMING_BLOCKS


def a_side(behind: int) -> Side:
    return Side([1000] * 4, 8000, 8000, [], behind)


def test_the_head_start_grows_until_the_host_is_ahead() -> None:
    ahead, behind = Block(a_side(0), a_side(1)), Block(a_side(0), a_side(4))
    assert next_head_start(ahead, HEAD_STARTS[0]) is None
    assert next_head_start(behind, HEAD_STARTS[0]) == HEAD_STARTS[1]
    assert next_head_start(behind, HEAD_STARTS[-1]) is None
    assert least_that_does({0: behind, 100_000: behind, 400_000: ahead}) == 400_000
    waits = Block(a_side(4), a_side(0))  # a reference that waits for the device itself: no head start helps it
    assert least_that_does({0: Block(a_side(4), a_side(4)), 100_000: waits, 1_600_000: waits}) == 100_000
    assert least_that_does({0: behind, 100_000: behind}) == 0


def test_the_interval_told_holds_what_a_second_run_differs_by() -> None:
    narrow = stated(Speedup(2.0, 1.999, 2.002, 2.0, 1.0), 0.0)
    assert narrow.low == pytest.approx(2.0 * math.exp(-RUN_TO_RUN), rel=1e-3)
    assert narrow.high == pytest.approx(2.0 * math.exp(RUN_TO_RUN), rel=1e-3)
    wide = stated(Speedup(2.0, 1.6, 2.4, 2.0, 1.0), 0.01)
    assert (wide.low, wide.high) == pytest.approx((1.6, 2.4), rel=1e-3)
    by_place = stated(Speedup(2.0, 1.999, 2.002, 2.0, 1.0), 0.2)
    assert by_place.high == pytest.approx(2.0 * math.exp(0.2), rel=2e-3)


def test_places_in_memory_widen_the_interval_and_repeats_at_one_place_do_not() -> None:
    assert between([2.0], 5) == 0.0
    assert between([2.0] * 5, 5) == pytest.approx(0.0)
    three = between([2.0, 2.1, 2.2], 5)  # sd of the logs 0.0477, t of 2 degrees of freedom 4.303
    assert three == pytest.approx(4.303 * 0.04766 / 3**0.5, rel=1e-3)
    assert between([2.0, 2.1, 2.2] * 9, 3) == pytest.approx(three)
