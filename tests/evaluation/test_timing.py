"""Intervals on synthetic times of known truth: how often they hold it, as the harness takes its rounds."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specgen_engine.evaluation import clock as clock_module
from specgen_engine.evaluation.clock import CpuClock
from specgen_engine.evaluation.modules import PLACED_BYTES, PLACES, TimedCalls
from specgen_engine.evaluation.timing import (
    HOST_RUN_TO_RUN,
    LEAST_ROUNDS,
    MIN_ROUNDS,
    RUN_TO_RUN,
    Round,
    Speedup,
    floor_of,
    half_interval,
    is_enough,
    speedup,
    undisturbed,
    warning,
)

CALLS, NOISE, RUNS = 30, 0.02, 250
"""Calls of a block; standard deviation of the logarithm of a call's time; synthetic runs of a kind of disturbance."""
BUDGET_ROUNDS, PRECISION, TRUTH = 8, 0.03, 2.0
Disturbance = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def drift(rng: np.random.Generator, count: int, calls: float, share: float = 0.03) -> np.ndarray:
    """A first-order autoregressive process: what disturbs a call disturbs the next ones too, for some calls."""
    keep = math.exp(-1 / calls)
    steps, values = rng.normal(0, share, count), np.empty(count)
    values[0] = steps[0]
    for at in range(1, count):
        values[at] = keep * values[at - 1] + math.sqrt(1 - keep * keep) * steps[at]
    return values


def independent(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rounds, CALLS)), np.zeros((rounds, CALLS))


def places(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Each round's addresses are worth some percent, on either side."""
    return tuple(np.repeat(rng.normal(0, 0.02, (rounds, 1)), CALLS, axis=1) for _ in range(2))  # type: ignore


def by_turns(along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What lasts while blocks of both sides follow one another."""
    parts = along.reshape(-1, 2, CALLS)
    return parts[:, 0], parts[:, 1]


def short_drift(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    return by_turns(drift(rng, 2 * rounds * CALLS, 10))


def long_drift(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    return by_turns(drift(rng, 2 * rounds * CALLS, 2 * CALLS))


def drift_of_one_side(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """A host that launches late for three rounds or so disturbs only the side whose launches it can't hide."""
    return np.zeros((rounds, CALLS)), drift(rng, rounds * CALLS, 1.5 * CALLS).reshape(rounds, CALLS)


def two_states(rng: np.random.Generator, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """8 % slower or not, for 90 calls on average."""
    changes = rng.random(2 * rounds * CALLS) < 1 / 90
    return by_turns(0.08 * ((np.cumsum(changes) + rng.integers(2)) % 2))


DISTURBANCES = (independent, places, short_drift, long_drift, drift_of_one_side, two_states)


def runs_of(disturbance: Disturbance, seed: int) -> Iterator[list[Round]]:
    """Each as long as the harness would go on, of at most BUDGET_ROUNDS."""
    rng = np.random.default_rng(seed)
    for _ in range(RUNS):
        sides = disturbance(rng, BUDGET_ROUNDS)
        process = rng.normal(0, RUN_TO_RUN / 1.96)  # what the whole run differs by from another
        noisy = [np.exp(side + rng.normal(0, NOISE, side.shape)) * 1e6 for side in sides]
        reference, candidate = noisy[0] * TRUTH * math.exp(process), noisy[1]
        rounds: list[Round] = []
        for mine, other in zip(reference, candidate, strict=True):
            rounds.append(Round(mine.astype(int).tolist(), other.astype(int).tolist()))
            if is_enough(speedup(rounds), len(rounds), PRECISION, over=False):
                break
        yield rounds


def old_interval(rounds: list[Round], rng: np.random.Generator) -> tuple[float, float]:
    """As it was told before: calls resampled as if they were independent, then 1 % in quadrature."""
    sides = [np.array([ns for one in rounds for ns in one[side]], float) for side in range(2)]
    medians = [np.median(rng.choice(side, (400, side.size)), axis=1) for side in sides]
    ratio = float(np.median(sides[0]) / np.median(sides[1]))
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    off = [math.hypot((bound - ratio) / ratio, 0.01) for bound in (low, high)]
    return ratio * (1 - off[0]), ratio * (1 + off[1])


def coverage(intervals: list[tuple[float, float]]) -> float:
    return sum(low <= TRUTH <= high for low, high in intervals) / len(intervals)


@pytest.mark.parametrize("disturbance", DISTURBANCES, ids=lambda one: one.__name__)
def test_nineteen_of_twenty_intervals_hold_the_truth(disturbance: Disturbance) -> None:
    found = [speedup(rounds) for rounds in runs_of(disturbance, seed=1)]
    assert coverage([(one.low, one.high) for one in found]) >= 0.95
    pairs = list(itertools.pairwise(found))
    assert sum(a.low <= b.high and b.low <= a.high for a, b in pairs) / len(pairs) >= 0.95


@pytest.mark.parametrize("disturbance", DISTURBANCES[1:], ids=lambda one: one.__name__)
def test_resampling_calls_as_if_they_were_independent_held_it_less_often(disturbance: Disturbance) -> None:
    rng = np.random.default_rng(2)
    assert coverage([old_interval(rounds, rng) for rounds in runs_of(disturbance, seed=1)]) < 0.93


def test_where_nothing_disturbs_the_interval_is_what_runs_differ_by() -> None:
    quiet = [Round([2_000_000] * 9, [1_000_000] * 9)] * MIN_ROUNDS
    found = speedup(quiet)
    assert (found.speedup, found.reference_ms, found.candidate_ms) == (2.0, 2.0, 1.0)
    assert found.low == pytest.approx(2.0 * math.exp(-RUN_TO_RUN))
    assert found.high == pytest.approx(2.0 * math.exp(RUN_TO_RUN))


def test_more_calls_a_round_do_not_narrow_it_and_more_rounds_do() -> None:
    few = [Round([2_000_000 + 40_000 * at] * 9, [1_000_000] * 9) for at in range(4)]
    many = [Round(one.reference * 20, one.candidate * 20) for one in few]
    assert speedup(many).half_width == pytest.approx(speedup(few).half_width)
    assert speedup(few * 2).half_width < 0.8 * speedup(few).half_width


def test_a_side_that_waits_for_the_host_has_the_host_s_interval() -> None:
    assert floor_of([]) == RUN_TO_RUN
    assert floor_of([(0.0, 0.2), (0.1, 1.0), (0.0, 0.4)]) == RUN_TO_RUN  # one round of three
    assert floor_of([(0.0, 0.9), (0.0, 0.2), (0.0, 1.0)]) == HOST_RUN_TO_RUN
    assert floor_of([(1.0, 0.0)]) == HOST_RUN_TO_RUN
    quiet = [Round([2_000_000] * 9, [1_000_000] * 9)] * MIN_ROUNDS
    assert speedup(quiet, HOST_RUN_TO_RUN).low == pytest.approx(2.0 * math.exp(-HOST_RUN_TO_RUN))


CALM, LATE = (0.0, 0.05), (0.0, 0.9)
SLOW = Round([2_000_000] * 9, [1_500_000] * 9)
EVEN = Round([2_000_000] * 9, [1_000_000] * 9)


def test_a_round_in_which_the_host_came_late_is_left_out_where_it_is_an_exception() -> None:
    rounds, behind = [EVEN] * 3 + [SLOW] + [EVEN] * 3, [CALM] * 3 + [LATE] + [CALM] * 3
    assert undisturbed(rounds, behind) == [EVEN] * 6
    assert speedup(rounds).half_width > 0.2
    assert speedup(undisturbed(rounds, behind)).half_width == pytest.approx(RUN_TO_RUN, rel=0.01)


def test_intervals_without_late_rounds_hold_the_truth_and_are_narrower() -> None:
    """A tenth of rounds in which the candidate's launches take half as long again as the kernel, and it is known."""
    rng = np.random.default_rng(3)
    found: dict[str, list[Speedup]] = {"all": [], "undisturbed": []}
    for _ in range(RUNS):
        late = rng.random(12) < 0.1
        truth = TRUTH * math.exp(rng.normal(0, RUN_TO_RUN / 1.96))
        times = np.exp(rng.normal(0, NOISE, (2, 12, CALLS))) * 1e6 * np.array([truth, 1.0])[:, None, None]
        times[1, late] *= 1.5
        rounds = [Round(*map(list, sides)) for sides in zip(*times.astype(int).tolist(), strict=True)]
        found["all"].append(speedup(rounds))
        found["undisturbed"].append(speedup(undisturbed(rounds, [LATE if one else CALM for one in late])))
    assert all(coverage([(one.low, one.high) for one in some]) >= 0.95 for some in found.values())
    widths = {name: np.mean([one.half_width for one in some]) for name, some in found.items()}
    assert widths["undisturbed"] < 0.25 * widths["all"]


@pytest.mark.parametrize(
    ("count", "late"), [(5, 1), (7, 2), (12, 4), (3, 3)], ids=["too few left", "a third", "a third", "all"]
)
def test_rounds_in_which_the_host_came_late_stay_where_they_are_no_exception(count: int, late: int) -> None:
    rounds = [EVEN] * (count - late) + [SLOW] * late
    assert undisturbed(rounds, [CALM] * (count - late) + [LATE] * late) == rounds


def test_a_round_that_differs_while_the_host_was_in_time_stays() -> None:
    assert undisturbed([EVEN] * 8 + [SLOW], [CALM] * 9) == [EVEN] * 8 + [SLOW]


def test_a_speedup_that_is_not_known_well_says_so_and_why() -> None:
    good, wide = Speedup(2.0, 1.95, 2.06, 2.0, 1.0), Speedup(2.0, 1.1, 3.6, 2.0, 1.0)
    late = {"reference": 1.0, "candidate": 0.1}
    assert warning(good, late, {}) == ""
    assert warning(wide, {"reference": 0.2, "candidate": 0.1}, {}) == "known within 80% only: its rounds differ"
    said = "known within 80% only: the GPU waits for the host in the calls of the reference"
    assert warning(wide, late, {}) == said
    assert warning(wide, late, {"candidate": 0.5}) == said
    assert warning(wide, late, {"reference": 0.31}) == f"{said} (31% of the time spent waiting for a CPU)"
    both = warning(wide, {"reference": 1.0, "candidate": 0.9}, {"reference": 0.3, "candidate": 0.2})
    assert "the reference and the candidate (30% and 20% of" in both


def test_a_process_without_a_cpu_of_its_own_is_seen_to_wait() -> None:
    if clock_module.waited_for_cpu(1) is None and clock_module.waited_for_cpu(os.getpid()) is None:
        pytest.skip("this kernel doesn't count it (CONFIG_SCHED_INFO)")
    spin = [
        sys.executable,
        "-c",
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass",
    ]
    spinning = [subprocess.Popen(spin) for _ in range(2)]
    try:
        waited = []
        until = time.monotonic() + 10
        while time.monotonic() < until and (not waited or min(waited) < 200_000_000):  # two on one: half the time each
            time.sleep(0.1)
            waited = [clock_module.waited_for_cpu(one.pid) or 0 for one in spinning]
        assert min(waited) >= 200_000_000
    finally:
        for one in spinning:
            one.kill()
            one.wait()
    assert clock_module.waited_for_cpu(spinning[0].pid) is None


def test_inputs_are_replaced_after_the_device_was_made_to_wait_and_before_it_is_timed() -> None:
    """Else another stream could work on the new inputs while the timed one waits."""
    done: list[str] = []
    clock = SimpleNamespace(
        lead=lambda: done.append(f"lead {calls.working[0][0]:.0f}"),
        time=lambda call: (1, done.append("time") or call()),
    )
    calls = TimedCalls(torch.relu, {0: [torch.zeros(4)], 1: [torch.ones(4)]}, clock)  # type: ignore[arg-type]
    calls.run([1], lambda x: done.append(f"call {x[0]:.0f}"))
    assert done == ["lead 0", "time", "call 1"]


def test_the_host_is_behind_when_the_device_began_before_all_was_launched(monkeypatch) -> None:
    """The CUDA clock on stand-ins for the driver's functions; the real ones are tested on a GPU."""
    done: list[str] = []
    started = iter((False, True, True))

    def event(enable_timing: bool) -> SimpleNamespace:
        name = "start" if "event start" not in done else "end"
        done.append(f"event {name}")
        return SimpleNamespace(
            record=lambda: done.append(name),
            query=lambda: next(started),
            synchronize=lambda: None,
            elapsed_time=lambda end: 0.25,
        )

    monkeypatch.setattr(clock_module, "L2_FLUSH_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("quiet"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"))
    clock = clock_module.CudaClock("cpu")
    done.clear()
    for _ in range(3):
        clock.lead()
        assert clock.time(lambda: done.append("call")) == (250_000, None)
    assert done[:6] == ["quiet", "wait", "start", "call", "end", "quiet"]
    assert (clock.take_behind(), clock.take_behind(), len(clock.take_late())) == (2, 0, 3)


def test_a_single_round_says_nothing_of_another() -> None:
    assert half_interval([0.7], 0.7) == math.inf
    assert speedup([Round([2], [1])]).low == 0.0


def test_rounds_end_when_the_interval_is_small_or_the_budget_is_over() -> None:
    narrow, wide = Speedup(2.0, 1.99, 2.01, 2.0, 1.0), Speedup(2.0, 1.5, 2.5, 2.0, 1.0)
    assert is_enough(narrow, MIN_ROUNDS, 0.03, over=False)
    assert not is_enough(narrow, MIN_ROUNDS - 1, 0.03, over=False)
    assert not is_enough(wide, MIN_ROUNDS, 0.03, over=False)
    assert is_enough(wide, LEAST_ROUNDS, 0.03, over=True)
    assert not is_enough(wide, LEAST_ROUNDS - 1, 0.03, over=True)


@pytest.mark.parametrize("rounds", [[], [Round([1, 2], [0, 3])], [Round([], [])]])
def test_a_speedup_refuses_nonsense(rounds: list[Round]) -> None:
    with pytest.raises(ValueError, match="positive"):
        speedup(rounds)


def test_rounds_lie_at_several_places_in_memory_and_then_at_these_by_turns() -> None:
    calls = TimedCalls(torch.relu, {0: [torch.randn(4096)]}, CpuClock(1))
    places = [calls.working[0].data_ptr()]
    for _ in range(2 * PLACES - 1):
        calls.move()
        calls.run([0], torch.relu)
        assert torch.equal(calls.working[0], calls.sources[0][0])
        places.append(calls.working[0].data_ptr())
    assert len(set(places)) == PLACES
    assert places[:PLACES] == places[PLACES:]


def test_inputs_that_fill_much_memory_stay_where_they_are() -> None:
    calls = TimedCalls(torch.relu, {0: [torch.empty(PLACED_BYTES + 1, dtype=torch.uint8)]}, CpuClock(1))
    place = calls.working[0].data_ptr()
    calls.move()
    assert calls.working[0].data_ptr() == place


FAULTS = """
import resource, sys, torch
from specgen_engine.evaluation.worker_main import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
x = torch.ones(4 << 20)
def call():
    return ((x + 1) * (x + 2)).sum()
for _ in range(5):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_call_s_temporaries_get_the_memory_of_the_call_before() -> None:
    """Beside what glibc does where it maps every large block anew; by default it may do either."""
    faults, anew = {}, {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    for way in ("kept", "anew"):
        done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True, env=anew)
        faults[way] = int(done.stdout)
    pages = (4 << 20) * 4 // 4096  # of one temporary; ten calls make thirty of them
    assert faults["kept"] <= 2 * pages < faults["anew"], faults
