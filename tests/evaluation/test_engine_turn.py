"""An engine and timed runs on one device: who stands still for whom, and for how long at most."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from specgen_engine.evaluation.engine_turn import LONGEST_PAUSE_S, EngineTurn, engine_still, may_pause

DEVICE = "cuda:77"


class Clock:
    """Seconds pass only in sleep(); `then` happens after that many sleeps."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, 0
        self.then: dict[int, Callable[[], object]] = {}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1
        self.then.pop(self.sleeps, lambda: None)()


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def finished() -> list[float]:
    return []


@pytest.fixture
def engine(clock: Clock, finished: list[float]) -> Iterator[EngineTurn]:
    turn = EngineTurn(DEVICE, 0.5, lambda: finished.append(clock.now), clock, clock.sleep)
    yield turn
    turn.close()


def asking() -> ExitStack:
    """A timed run that waits for nobody."""
    run = ExitStack()
    run.enter_context(engine_still(DEVICE, time.sleep, longest_s=0.0))
    return run


@pytest.mark.parametrize(
    ("ran", "paused", "share", "may"),
    [(0, 0, 0.5, True), (0.9, 1, 0.5, False), (1, 1, 0.5, True), (2.9, 1, 0.25, False), (3, 1, 0.25, True)],
)
def test_after_a_pause_the_engine_runs_for_its_share(ran: float, paused: float, share: float, may: bool) -> None:
    assert may_pause(ran, paused, share) is may


def test_an_engine_that_nobody_asks_runs(engine: EngineTurn, clock: Clock, finished: list[float]) -> None:
    for _ in range(3):
        engine.step()
    assert (clock.sleeps, engine.pauses.count, finished) == (0, 0, [])


def test_asked_it_finishes_what_is_in_flight_and_stands_still_until_the_run_is_over(
    engine: EngineTurn, clock: Clock, finished: list[float]
) -> None:
    engine.step()
    clock.now = 1.0
    run = asking()
    clock.then[4] = run.close
    engine.step()
    assert finished == [1.0]
    assert clock.sleeps == 4
    assert (engine.pauses.count, engine.pauses.broken) == (1, 0)
    assert engine.pauses.seconds == pytest.approx(clock.now - 1.0)


def test_it_does_not_stand_still_again_before_it_has_run_as_long(engine: EngineTurn, clock: Clock) -> None:
    engine.step()
    run = asking()
    clock.then[100] = run.close
    engine.step()
    paused = clock.now
    with asking():
        clock.now += 0.9 * paused
        engine.step()
        assert engine.pauses.count == 1
    run = asking()
    clock.now += 0.2 * paused
    clock.then[clock.sleeps + 1] = run.close
    engine.step()
    assert engine.pauses.count == 2


def test_a_run_that_does_not_end_keeps_the_engine_for_a_few_seconds_only(engine: EngineTurn, clock: Clock) -> None:
    with engine_still(DEVICE, time.sleep) as stillness:
        engine.step()
        engine.idle()
    assert clock.now == pytest.approx(LONGEST_PAUSE_S, abs=0.01)
    assert (engine.pauses.count, engine.pauses.broken) == (1, 1)
    assert not stillness.kept
    with engine_still(DEVICE, time.sleep) as next_run:
        pass
    assert next_run.kept


def test_its_share_holds_for_an_engine_that_was_idle_too(engine: EngineTurn, clock: Clock) -> None:
    engine.step()
    with asking():
        engine.step()
        paused = clock.now
        for ran_s in (0.1, 1.0, paused):
            clock.now = paused + ran_s
            engine.idle()
            engine.step()
            assert engine.pauses.count == (1 if ran_s < paused else 2)


def test_a_run_waits_for_the_step_in_flight_and_then_has_the_device(engine: EngineTurn) -> None:
    real = EngineTurn(DEVICE, 0.5, lambda: None)
    real.step()
    over, order = threading.Event(), []

    def step() -> None:
        time.sleep(0.05)
        order.append("asked")
        real.step()
        order.append("resumed")
        over.set()

    threading.Thread(target=step, daemon=True).start()
    with engine_still(DEVICE, time.sleep) as stillness:
        order.append("timed")
        assert not over.wait(0.05)
    assert over.wait(2)
    assert order == ["asked", "timed", "resumed"]
    assert stillness.kept
    assert stillness.waited_s >= 0.04
    real.close()


def test_an_idle_engine_is_in_nobodys_way(engine: EngineTurn) -> None:
    engine.step()
    engine.idle()
    with engine_still(DEVICE, time.sleep) as stillness:
        assert stillness.waited_s < 0.05
    assert stillness.kept


def test_two_engines_and_two_runs_do_not_exclude_one_another(engine: EngineTurn) -> None:
    other = EngineTurn(DEVICE, 0.5, lambda: None)
    engine.step()
    other.step()
    engine.idle()
    other.idle()
    with asking(), engine_still(DEVICE, time.sleep) as second:
        assert second.waited_s < 0.05
    other.close()


def test_an_engine_that_takes_no_step_is_not_awaited_for_ever(engine: EngineTurn) -> None:
    engine.step()
    with engine_still(DEVICE, time.sleep, longest_s=0.1) as stillness:
        engine.idle()  # too late: it was timed beside it
    assert 0.1 <= stillness.waited_s < 1
    assert not stillness.kept


def test_a_killed_engine_holds_nothing() -> None:
    import tempfile

    source = (
        f"import tempfile, time; tempfile.tempdir = {tempfile.tempdir!r}\n"
        "from specgen_engine.evaluation.engine_turn import EngineTurn\n"
        f"EngineTurn({DEVICE!r}, 0.5, lambda: None).step(); print('runs', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n"
    with engine_still(DEVICE, time.sleep, longest_s=0.1) as stillness:
        pass
    assert not stillness.kept
    process.send_signal(signal.SIGKILL)
    process.wait()
    with engine_still(DEVICE, time.sleep) as stillness:
        assert stillness.waited_s < 0.05
    assert stillness.kept
